"""What a user should know of a dataset before training: sizes, small images, copies, long captions."""

import re
from collections import Counter
from collections.abc import Callable

from sdtune.config.slow_imports import keeping
from sdtune.data.buckets import Shape
from sdtune.data.sources import Row
from sdtune.data.stream import SEPARATOR, Stream

_WEIGHTS = re.compile(
    r"\([^()]{1,200}:\s{0,9}-?\d{1,9}(?:\.\d{0,9})?\s{0,9}\)|<(?:lora|lyco|lycoris|hypernet):[^<>]{1,200}>"
)
"""Weights of A1111 and ComfyUI."""


SHOWN = 200
"""Most letters of lost words that are shown."""


@keeping()
def summarize(
    stream: Stream,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    window: int = 77,
    lost_words: Callable[[str], str] = lambda caption: "",
    way_out: str = "",
) -> list[str]:
    """Lines about the data that the user should read before training.

    Args:
        count_tokens: gives the lengths of captions in tokens, with the special ones; ``None`` reads no captions.
        window: tokens that the text encoder reads, with the special ones.
        lost_words: the words of a caption beyond it.
        way_out: the option that has longer captions read.
    """
    images, rows = stream.images, stream.images.rows
    more = f", {len(stream.holdout)} more held out" if stream.holdout else ""
    if images.subjects > 1:
        more += f", of {images.subjects} concepts"
    if of_class := sum(images.sizes[images.subjects :]):
        more += f", {of_class} of them of the class"
    steps = f"{stream.epoch_length / stream.group:.4g} steps of {stream.group} images"
    lines = [f"images: {len(stream.indices)}{more}; an epoch is {steps}"]
    lines += images.notes
    if images.ignored:
        lines.append(f"other files, ignored: {len(images.ignored)} ({_first_names(images.ignored)})")
    if images.skipped:
        named = [f"{name}: {reason}" for name, reason in images.skipped]
        lines.append(f"bad images, left out: {len(named)} ({_first_names(named)})")
    if stream.cfg.buckets:
        lines.append(_bucket_line(stream))
    by_size = _names_by_size(stream)
    lines += _cropped_line(by_size, stream.cfg.buckets)
    lines += _small_line(by_size)
    copies = [count for count in Counter(row.sha256 for row in rows).values() if count > 1]
    if copies:
        lines.append(f"exact copies of other images, which are therefore shown more often: {sum(copies) - len(copies)}")
    lines += _syntax_lines(stream)
    if count_tokens:
        lines += _long_captions(rows, count_tokens, window, lost_words, way_out)
    return lines


def _first_names(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bucket_line(stream: Stream) -> str:
    sizes = sorted(stream.buckets.items(), key=lambda item: (-len(item[1]), item[0]))
    line = "buckets: " + ", ".join(f"{width} x {height}: {len(set(held))}" for (width, height), held in sizes)
    least = len(sizes[-1][1]) * stream.cfg.repeats
    share = -(-least // stream.group) * stream.group / least
    if share > 1:
        line += f"; a step has one shape, so images of the last one are shown {share:.3g} times an epoch"
    return line


def _names_by_size(stream: Stream) -> dict[tuple[int, int, Shape], list[str]]:
    """The names of the images by their width, height and training shape, of which most datasets have few."""
    found: dict[tuple[int, int, Shape], list[str]] = {}
    for index in stream.indices:
        row = stream.images.rows[index]
        found.setdefault((row.width, row.height, stream.shapes[index]), []).append(row.name)
    return found


def _cropped_line(by_size: dict[tuple[int, int, Shape], list[str]], buckets: bool) -> list[str]:
    """How much of their area images lose that are cropped to another shape."""
    lost = []
    for (own_width, own_height, (width, height)), names in by_size.items():
        scale = max(width / own_width, height / own_height)
        lost.append((1 - width * height / (own_width * own_height * scale**2), names))
    cropped = [(share, names) for share, names in lost if share > 0.03]
    if not cropped:
        return []
    most, name = max((share, max(names)) for share, names in cropped)
    way_out = "a larger --bucket-max-aspect or a smaller --bucket-step" if buckets else "--buckets"
    count = sum(len(names) for _, names in cropped)
    return [f"images that lose more than 3 % when cropped: {count} (most {name}, {most:.0%}); {way_out} keeps more"]


def _syntax_lines(stream: Stream) -> list[str]:
    """Captions in which signs have a meaning to other programs, or to this one."""
    named = [(row.name, caption) for row in stream.images.rows for caption in row.captions]
    lines = []
    if weighted := [name for name, caption in named if _WEIGHTS.search(caption)]:
        lines.append(
            f"captions with weights such as (word:1.2) or <lora:...>, which are read as ordinary text: {len(weighted)} "
            f"({_first_names(weighted, 3)})"
        )
    if separated := [name for name, caption in named if SEPARATOR in caption]:
        lines.append(f"captions in which {SEPARATOR} separates tags that stay in place: {len(separated)}")
    return lines


def _small_line(by_size: dict[tuple[int, int, Shape], list[str]]) -> list[str]:
    small = []
    for (own_width, own_height, (width, height)), names in by_size.items():
        if (scale := max(width / own_width, height / own_height)) > 1:
            small.append((scale, f"{names[0]}, {own_width} x {own_height}", len(names)))
    if not small:
        return []
    count = sum(count for *_, count in small)
    _, least, _ = max(small, key=lambda item: item[0])
    return [f"images smaller than their training shape, enlarged: {count} (the smallest is {least})"]


def _long_captions(
    rows: list[Row],
    count_tokens: Callable[[list[str]], list[int]],
    window: int,
    lost_words: Callable[[str], str],
    way_out: str,
) -> list[str]:
    captions = list(dict.fromkeys(caption for row in rows for caption in row.captions))
    tokens = dict(zip(captions, count_tokens(captions), strict=True))
    lengths = [(tokens[caption], row.name, caption) for row in rows for caption in row.captions]
    over = sorted([known for known in lengths if known[0] > window], key=lambda known: -known[0])
    if not over:
        return []
    lost = sum(length - window for length, _, _ in over)
    longest = ", ".join(f"{name}: {length}" for length, name, _ in over[:3])
    lines = [f"captions over the text encoder's {window} tokens: {len(over)}, {lost} tokens lost (longest {longest})"]
    if words := lost_words(over[0][2]):
        lines.append(f"{over[0][1]} loses: {words if len(words) <= SHOWN else f'{words[:SHOWN]}...'}")
    if way_out:
        lines.append(f"{way_out} has longer captions read")
    return ["; ".join(lines)]
