"""The built-in datasets, which are given by a short name."""

import hashlib
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdtune.config.sections import UserError
from sdtune.data import toy_world
from sdtune.data.cache_folder import cache_root
from sdtune.data.toy_hearts import draw_hearts
from sdtune.data.toy_pairs import draw_captioned, draw_edges, draw_edits, draw_shapes
from sdtune.data.toy_subjects import draw_subjects
from sdtune.run.files import sweep_folders

ASSETS = Path(__file__).parent.parent / "assets"


def _drawn(name: str, draw: Callable[[Path], None]) -> Path:
    """The folder of a dataset in the cache, which ``draw`` fills once, under another name that is then changed.

    Code that draws otherwise, as another version of sdtune may have it, has a folder of its own.
    """
    files = [Path(inspect.getfile(draw)), Path(toy_world.__file__)]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    folder = cache_root() / "datasets" / f"{name}-{code[:8]}"
    if folder.is_dir():
        return folder
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    sweep_folders(new)
    try:
        draw(new)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.is_dir():  # else another process was faster
            raise UserError(f"--dataset {name}: {folder} cannot be written ({error.strerror})") from error
    return folder


def digits() -> Path:
    """scikit-learn's ``load_digits``, 1797 handwritten digits of 8 x 8 grey pixels, in folders ``0`` to ``9``.

    The 17 levels of grey, 0 to 16, span 0 to 255.
    """

    def draw(folder: Path) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("--dataset digits: comes with scikit-learn; pip install 'sdtune[digits]'") from None
        data = load_digits()
        for k, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            file = folder / str(label) / f"{k:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(file)

    return _drawn("digits", draw)


BUILT_IN: dict[str, Callable[[], Path]] = {
    "tiny-hearts": lambda: ASSETS / "tiny-hearts",
    "tiny-subject": lambda: ASSETS / "tiny-subject",
    "tiny-word": lambda: ASSETS / "tiny-word",
    "tiny-words": lambda: _drawn("tiny-words", draw_subjects),
    "many-hearts": lambda: _drawn("many-hearts", draw_hearts),
    "tiny-edges": lambda: _drawn("tiny-edges", draw_edges),
    "tiny-edits": lambda: _drawn("tiny-edits", draw_edits),
    "tiny-shapes": lambda: _drawn("tiny-shapes", draw_shapes),
    "many-shapes": lambda: _drawn("many-shapes", draw_captioned),
    "digits": digits,
}
"""Name of a dataset -> function that gives its folder."""
