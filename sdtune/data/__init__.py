"""Images in, samples out: find and check them, then say which one, cropped and captioned how, a position shows."""

from sdtune.data.images import MODES
from sdtune.data.probes import cache_root
from sdtune.data.sources import Images, Row, load_images
from sdtune.data.stream import Sample, Stream, positions, report

__all__ = ["MODES", "Images", "Row", "Sample", "Stream", "cache_root", "load_images", "positions", "report"]
