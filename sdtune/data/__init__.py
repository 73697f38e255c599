"""Images and captions, from files to the sample at a position of the run. Imports `config` and `run`."""

from sdtune.data.cache_folder import cache_root
from sdtune.data.images import MODES
from sdtune.data.mixture import Mixture
from sdtune.data.shard_stream import ShardStream, open_images, open_stream
from sdtune.data.shards import Record, Shards
from sdtune.data.sources import Images, Row, load_images, with_captions
from sdtune.data.stream import Sample, Stream, positions
from sdtune.data.summary import summarize

__all__ = [
    "MODES",
    "Images",
    "Mixture",
    "Record",
    "Row",
    "Sample",
    "ShardStream",
    "Shards",
    "Stream",
    "cache_root",
    "load_images",
    "open_images",
    "open_stream",
    "positions",
    "summarize",
    "with_captions",
]
