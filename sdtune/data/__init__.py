"""Images and captions, from files to the sample at a position of the run. Imports `config` and `run`."""

from sdtune.data.images import MODES
from sdtune.data.probes import cache_root
from sdtune.data.shards import Record, Shards
from sdtune.data.sources import Images, Mixture, Row, captioned, load_images
from sdtune.data.stream import Sample, Stream, positions, report
from sdtune.data.streamed import Streamed, open_images, open_stream

__all__ = [
    "MODES",
    "Images",
    "Mixture",
    "Record",
    "Row",
    "Sample",
    "Shards",
    "Stream",
    "Streamed",
    "cache_root",
    "captioned",
    "load_images",
    "open_images",
    "open_stream",
    "positions",
    "report",
]
