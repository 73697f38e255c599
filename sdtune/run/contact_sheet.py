"""Contact sheets: many images in one, each with its caption below it. Uses Pillow only."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

MIN_SIDE = 160  # pixels; below this neither the image nor the caption below it is readable
GAP, TEXT_SIZE, LINE, MAX_LINES = 12, 14, 19, 3
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "segoeui.ttf", "Arial.ttf")


def grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """``images`` in rows, in order, on white, with ``captions`` below them (at most three lines each).

    Small images are enlarged by a whole factor without smoothing, to a width of at least 160 pixels. No image is
    reduced. Default of ``columns``: one row for up to four images, else about a square. The sheet's
    ``info["sdtune"]`` holds the place of each image, which `cells` reads.

    Raises:
        ValueError: there are no images, or the number of captions differs.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    columns = columns or (len(images) if len(images) <= 4 else math.ceil(math.sqrt(len(images))))
    columns = min(columns, len(images))
    factors = [max(1, math.ceil(MIN_SIDE / image.width)) for image in images]
    shown = [
        opaque(image).resize((image.width * f, image.height * f), Image.Resampling.NEAREST)
        for image, f in zip(images, factors, strict=True)
    ]
    width, height = max(i.width for i in shown), max(i.height for i in shown)
    font = _font("".join(captions or []))
    texts = [_wrap(c, width, font) for c in captions or [""] * len(images)]
    below = LINE * max(len(t) for t in texts) + 4 if captions else 0
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * (height + below + GAP)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    places = []
    for k, (image, text) in enumerate(zip(shown, texts, strict=True)):
        x = GAP + k % columns * (width + GAP)
        y = GAP + k // columns * (height + below + GAP)
        sheet.paste(image, (x, y))
        for n, line in enumerate(text):
            draw.text((x, y + height + 4 + n * LINE), line, fill=(40, 44, 52), font=font)
        places.append([x, y, image.width, image.height, factors[k]])
    sheet.info["sdtune"] = json.dumps({"places": places, "captions": list(captions or [])})
    return sheet


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images as one, from left to right."""
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(opaque(image), (left, 0))
        left += image.width
    return row


def opaque(image: Image.Image) -> Image.Image:
    """``image`` in RGB, white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet of `grid` as PNG, complete or not at all. A text chunk holds what `cells` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("sdtune", sheet.info["sdtune"])
    partial = path.with_name(path.name + ".partial")
    sheet.save(partial, format="PNG", pnginfo=info)
    partial.replace(path)


def cells(sheet: Image.Image) -> list[tuple[Image.Image, str]]:
    """The images of a sheet at their original size, with their captions. Any other image is one cell."""
    try:
        layout = json.loads(sheet.info["sdtune"])
    except (KeyError, ValueError, RecursionError):
        return [(sheet.convert("RGB"), "")]
    found = []
    for k, (x, y, width, height, factor) in enumerate(layout["places"]):
        image = sheet.convert("RGB").crop((x, y, x + width, y + height))
        image = image.resize((width // factor, height // factor), Image.Resampling.NEAREST)
        found.append((image, layout["captions"][k] if layout["captions"] else ""))
    return found


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font for ASCII text, which is all that it has; for other text the first font found on the system."""
    for name in () if text.isascii() else FONTS:
        try:
            return ImageFont.truetype(name, TEXT_SIZE - 1)
        except OSError:
            continue
    return ImageFont.load_default(TEXT_SIZE)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """``text`` in at most three lines of ``width`` pixels; the rest becomes an ellipsis."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while font.getlength(word) > width:  # a word longer than a line continues on the next
            cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, line, word = [*lines, line] if line else lines, word[:cut], word[cut:]
            lines, line = [*lines, line], ""
        if font.getlength(f"{line} {word}".strip()) > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    lines = [*lines, line] if line else lines
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last.rstrip() + "…"]
    return lines
