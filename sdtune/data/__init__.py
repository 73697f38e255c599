"""Images in, samples out: find and check them, then say which one, cropped and captioned how, a position shows."""

from sdtune.data.images import MODES
from sdtune.data.probes import cache_root
from sdtune.data.sources import Images, Mixture, Row, captioned, load_images
from sdtune.data.stream import Sample, Stream, positions, report

__all__ = [
    "MODES",
    "Images",
    "Mixture",
    "Row",
    "Sample",
    "Stream",
    "cache_root",
    "captioned",
    "load_images",
    "positions",
    "report",
]
