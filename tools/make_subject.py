"""Draws the example subjects, five captioned images each: one that the base `tiny` has never seen, and one it has.

python tools/make_subject.py sdtune/assets

The first, the heart, is for methods that train weights. The second, the arrow, is for textual inversion, which can only
find what the base is able to draw; its captions do not say what it is.
"""

import sys
from pathlib import Path

from sdtune.data.toy_subjects import Subject, draw_subject, list_images


def make_subject(folder: Path, shape: str) -> None:
    """The images, each with a caption of a rare word (``text``) and of one that textual inversion adds (``word``)."""
    list_images(folder, draw_subject(folder, Subject(shape, "sks shape", "<thing>")))


if __name__ == "__main__":
    make_subject(Path(sys.argv[1]) / "tiny-subject", "heart")
    make_subject(Path(sys.argv[1]) / "tiny-word", "arrow")
