"""Draw the pictures of the documentation from the runs that it describes.

    python tools/make_pictures.py [--train]      # `make docs` without, `make pictures` with --train

With ``--train`` the runs are made first, where they are not there: about ten minutes on two quiet cores. Without, a
picture whose run is not there stays as it is. The same run gives the same bytes.
"""

import sys
from pathlib import Path

from PIL import Image

from sdtune.cli import main
from sdtune.run.contact_sheet import cells, grid

ROOT = Path(__file__).resolve().parent.parent
PICTURES, RUNS = ROOT / "docs" / "pictures", ROOT / "runs"
SUBJECT = ROOT / "sdtune" / "assets" / "tiny-subject"
COMMANDS = {
    "tiny-hearts": ["lora", "--config", "lora/tiny-hearts"],
    "my-subject": ["dreambooth", "--config", "dreambooth/tiny-subject", "--dataset", str(SUBJECT), "--steps", "300"],
}
"""Run -> the command that makes it: that of the demo, and that of docs/tutorial.md."""


def train(run: str) -> None:
    """The run of that name; nothing where it is finished."""
    try:
        main([*COMMANDS[run], "--output-dir", str(RUNS / run)])
    except SystemExit as ended:
        if ended.code:
            raise


def before_and_after(run: str) -> Image.Image | None:
    """The first sample grid of a run over its last one; None when there is no such run."""
    sheets = sorted((RUNS / run / "samples").glob("step-*.png"))
    if len(sheets) < 2:
        return None
    first, last = (cells(Image.open(sheet)) for sheet in (sheets[0], sheets[-1]))
    captions = ["before"] * len(first) + [f"after: {caption}" for _, caption in last]
    return grid([image for image, _ in first + last], captions, columns=len(first))


def subject() -> Image.Image:
    """The five pictures of the tutorial, side by side."""
    return grid([Image.open(file) for file in sorted(SUBJECT.glob("*.png"))], columns=5)


def save(image: Image.Image, name: str) -> None:
    """As a PNG of at most 256 colours: flat shapes lose nothing that an eye sees."""
    image.quantize(256, dither=Image.Dither.NONE).save(PICTURES / name, optimize=True)
    print((PICTURES / name).relative_to(ROOT))


if __name__ == "__main__":
    if "--train" in sys.argv:
        for run in COMMANDS:
            train(run)
    save(subject(), "subject.png")
    for run, name in (("tiny-hearts", "demo.png"), ("my-subject", "tutorial.png")):
        if (drawn := before_and_after(run)) is not None:
            save(drawn, name)
