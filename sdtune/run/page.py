"""Parts of pages that open from disk: images that carry their pixels, tables of settings, sample sheets."""

import base64
import io
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sdtune.run.contact_sheet import cells
from sdtune.run.curves import number

CELL_SIDE = 320  # pixels; larger samples are shown reduced


class Encoded(NamedTuple):
    """An image as a page shows it."""

    source: str
    """A ``data:`` address with all pixels: exact for a small image, else reduced to `CELL_SIDE` as WebP."""
    width: int
    height: int
    """Size of the image itself, in pixels."""
    caption: str

    def tag(self, alt: str) -> str:
        style = ' class="small"' if self.source.startswith("data:image/png") else ""
        size = f'width="{self.width}" height="{self.height}"'
        return f'<img{style} {size} alt="{escape(alt)}" src="{self.source}">'


def encode(image: Image.Image, caption: str = "") -> Encoded:
    data, kind = io.BytesIO(), "png"
    if max(image.size) <= 128:
        image.save(data, format="PNG", optimize=True)
    else:
        kind, small = "webp", image.copy()
        small.thumbnail((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS)
        small.save(data, format="WEBP", quality=85)
    text = base64.b64encode(data.getvalue()).decode()
    return Encoded(f"data:image/{kind};base64,{text}", *image.size, caption)


def evenly_spaced(files: list[Path], most: int) -> list[Path]:
    """At most ``most`` of the files, two or more, with the first and the last."""
    if len(files) <= most:
        return files
    return [files[round(k * (len(files) - 1) / (most - 1))] for k in range(most)]


def sheet_cells(sheet: Path) -> tuple[Encoded, ...]:
    """The images of a sample sheet; a sheet that has not changed is read once."""
    return _sheet_cells(sheet, sheet.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _sheet_cells(sheet: Path, _changed: int) -> tuple[Encoded, ...]:
    with Image.open(sheet) as opened:
        return tuple(encode(image, caption) for image, caption in cells(opened))


def text(value: Any) -> str:
    """The value of a setting as people write it."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(text, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return number(value) if isinstance(value, float) else str(value) or "empty"


def table(title: str, values: dict[str, Any], empty: str, style: str = "") -> str:
    """A table of names and values below a heading; ``empty`` stands there if there are none."""
    heading = f"<h3>{title}</h3>" if title else ""
    if not values:
        return f'{heading}<p class="none">{empty}</p>'
    rows = "".join(
        f'<tr class="{style}"><th scope="row">{label(k)}</th><td>{escape(text(v))}</td></tr>' for k, v in values.items()
    )
    return f'{heading}<table class="data"><tbody>{rows}</tbody></table>'


def label(name: str) -> str:
    """The name of an option, which may break at its underscores."""
    return escape(str(name)).replace("_", "_<wbr>")
