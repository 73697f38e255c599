"""The lengths of many captions are counted once, and are what the tokenizer says."""

import json
import shutil

import pytest
from PIL import Image

from sdtune.data import cache_root, token_counts
from sdtune.models.families import text
from tests.families.pipelines import t5_tokenizer
from tests.tinysd import tiny_tokenizer

CAPTIONS = ["a red circle", "", "blue " * 90, "İ ½ \u0958 ﷺ", "rot, grün"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def count(empty_cache, monkeypatch):
    """Counts as a family does, and remembers of how many captions."""
    monkeypatch.setattr(token_counts, "MANY", 2)

    def counted(tokenizer, captions):
        def lengths(texts):
            counted.asked.append(len(texts))
            return [len(ids) for ids in text.token_ids(tokenizer, texts)]

        return token_counts.token_counts(tokenizer, captions, lengths)

    counted.asked = []
    return counted


@pytest.mark.parametrize("make", [tiny_tokenizer, t5_tokenizer])
def test_many_are_counted_once(count, make):
    first = count(make(), CAPTIONS)
    assert first == [len(ids) for ids in text.token_ids(make(), CAPTIONS)]
    assert count(make(), CAPTIONS) == first
    assert count.asked == [5]


def test_other_captions_and_other_tokenizers_are_counted(count):
    count(tiny_tokenizer(), CAPTIONS)
    assert count(tiny_tokenizer(), CAPTIONS[1:])[0] == 2
    grown = tiny_tokenizer()
    grown.add_tokens(["red circle"])
    assert count(grown, CAPTIONS)[0] == count(tiny_tokenizer(), CAPTIONS)[0] - 1
    assert count.asked == [5, 4, 5]


def test_few_leave_no_file(count):
    count(tiny_tokenizer(), CAPTIONS[:1])
    assert not (cache_root() / "tokens").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '["a", "b", "c", "d", "e"]', "[1, 1, 1, 1, 1.0]"])
def test_a_damaged_file_is_made_anew(count, content):
    right = count(tiny_tokenizer(), CAPTIONS)
    (file,) = (cache_root() / "tokens").iterdir()
    file.write_text(content)
    assert count(tiny_tokenizer(), CAPTIONS) == right
    assert json.loads(file.read_text()) == right


def test_the_tokenizer_is_left_as_counting_leaves_it(count):
    """Other stores are named by its settings."""
    used = [tiny_tokenizer(), tiny_tokenizer()]
    for tokenizer in used:
        tokenizer("a", padding="max_length", truncation=True)
        count(tokenizer, CAPTIONS)
    assert count.asked == [5]
    assert used[0].backend_tokenizer.to_str() == used[1].backend_tokenizer.to_str()


def test_a_second_run_says_the_same_of_long_captions(empty_cache, lora, pictures, tmp_path, capfd, monkeypatch):
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    with (copy / "metadata.jsonl").open("a") as lines:
        Image.new("RGB", (40, 40)).save(copy / "long.png")
        lines.write(json.dumps({"file_name": "long.png", "text": "red circle " * 60}) + "\n")
    monkeypatch.setattr(token_counts, "MANY", 2)
    asked, real = [], text.token_ids
    monkeypatch.setattr(text, "token_ids", lambda tokenizer, texts: (asked.append(texts), real(tokenizer, texts))[1])
    said = []
    for name in ("one", "two"):
        lora(name, "--dataset", str(copy), "--steps", "1")
        said += [line for line in capfd.readouterr().out.splitlines() if "captions over" in line]
    assert len(asked) == 1
    assert said[0] == said[1]
    assert "tokens: 1, 45 tokens lost (longest long.png: 122); long.png loses: circle red" in said[0]
