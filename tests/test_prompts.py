"""Prompts and captions: nothing of them is cut, changed or without effect and not told."""

import pytest

from sdtune.config.sections import UserError
from sdtune.models import prompts
from tests.conftest import status
from tests.tinysd import tiny_tokenizer

LONG = " ".join(["a red circle"] * 26)  # 78 words of a token or more each


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_words_that_are_cut_are_told(tokenizer):
    assert prompts.lost_words(tokenizer, "a red circle") == ""
    assert prompts.lost_words(tokenizer, " ".join(["circle"] * 75)) == ""
    assert prompts.lost_words(tokenizer, " ".join(["circle"] * 75 + ["red", "a"])) == "red a"
    lines = []
    prompts.check_prompts("--prompt", [LONG, LONG, "a red circle"], tokenizer, lines.append)
    assert lines == ["--prompt: longer than the 77 tokens that this base reads; cut off: a red circle"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <lora:some name:0.8> circle", "<lora:some name:0.8> would be read as words; .* --adapter"),
        ("a (red:1.4) circle", r"\(red:1.4\) is how other programs weigh words"),
        ("a (big red : 0.5) circle", "other programs weigh words"),
    ],
)
def test_syntax_of_other_programs_is_refused_by_name(text, said, tokenizer, sd, tmp_path, capsys):
    with pytest.raises(UserError, match=f"--prompt: .*{said}"):
        prompts.check_prompts("--prompt", [text], tokenizer, print)
    notices = prompts.caption_notices(["a red circle", text], tokenizer)
    assert len(notices) == 1 and "read as words" in notices[0]


@pytest.mark.parametrize("text", ["a circle (red)", "at 10:30", "(a: b)", "<cat> and (x:y)", "a (1:2", "(" * 1000])
def test_what_is_no_such_syntax_is_left_alone(text, tokenizer):
    prompts.check_prompts("--prompt", [text[:60]], tokenizer, print)


def test_sample_tells_what_they_cut_and_what_has_no_effect(sd, tmp_path, capsys):
    words = ["--model", str(sd), "--prompt", LONG, "--negative-prompt", "blue", "--guidance-scale", "1", "--steps", "1"]
    assert status(["sample", *words, "--output-dir", str(tmp_path / "drawn")]) == 0
    told = capsys.readouterr().out
    assert "--prompt: longer than the 77 tokens" in told
    assert "--negative-prompt: has no effect at a guidance scale of 1" in told
    assert status(["sample", "--model", str(sd), "--prompt", "(red:1.4)", "--output-dir", str(tmp_path / "drawn")]) == 2
    assert "other programs weigh words" in capsys.readouterr().err
