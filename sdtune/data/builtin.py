"""The built-in datasets, which are given by a short name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdtune.config.sections import UserError
from sdtune.data.cache_folder import cache_root

ASSETS = Path(__file__).parent.parent / "assets"


def digits() -> Path:
    """scikit-learn's ``load_digits``, 1797 handwritten digits of 8 x 8 grey pixels, in folders ``0`` to ``9``.

    Written into the cache once, under another name that is then changed. The 17 levels of grey, 0 to 16, span 0 to 255.
    """
    folder = cache_root() / "datasets" / "digits"
    if folder.is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--dataset digits: comes with scikit-learn; pip install 'sdtune[digits]'") from None
    new = folder.with_name(f".digits-{os.getpid()}")
    data = load_digits()
    try:
        for k, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            file = new / str(label) / f"{k:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(file)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if not folder.is_dir():  # else another process was faster
            raise UserError(f"--dataset digits: {folder} cannot be written ({error.strerror})") from error
    return folder


BUILT_IN: dict[str, Callable[[], Path]] = {
    "tiny-hearts": lambda: ASSETS / "tiny-hearts",
    "tiny-subject": lambda: ASSETS / "tiny-subject",
    "tiny-word": lambda: ASSETS / "tiny-word",
    "digits": digits,
}
"""Name of a dataset -> function that gives its folder."""
