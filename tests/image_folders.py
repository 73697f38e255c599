"""Small folders of images for the tests of what people feed to a dataset."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.data import Images, Stream, load_images, summarize


def config(dataset: object, **fields) -> LoraConfig:
    step = {"bucket_step": 8} if fields.get("buckets") else {}
    return LoraConfig(dataset=str(dataset), **{"resolution": 16} | step | fields)


def paint(path: Path, size=(16, 16), shade=0) -> Path:
    """A file of one colour, in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 90, 200)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows_to(path: Path, *rows: dict) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refusal(dataset: object, **fields) -> str:
    with pytest.raises(UserError) as caught:
        load_images(config(dataset, **fields))
    return str(caught.value)


def names(images: Images) -> list[str]:
    return [row.name for row in images.rows]


def captions(images: Images) -> dict[str, tuple[str, ...]]:
    return {row.name: row.captions for row in images.rows}


def count_words(captions: list[str]) -> list[int]:
    """Stands for the lengths of captions in tokens."""
    return [len(caption.split()) for caption in captions]


def summary(folder: object, group: int = 1, **fields) -> str:
    """What is printed of the dataset before training."""
    cfg = config(folder, **fields)
    return "\n".join(summarize(Stream(cfg, load_images(cfg), group), count_words, 75))
