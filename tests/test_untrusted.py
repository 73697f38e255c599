"""Nothing that others wrote reaches a terminal or a card as a command; no secret of an address is written or shown."""

import ast
import json

import pytest
from huggingface_hub import ModelCard

from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.untrusted import echo, hide_secrets, printable
from sdtune.publish import model_card
from sdtune.publish.origin import Origin
from sdtune.run import folder
from sdtune.run.markdown import code_span, fence, heading
from sdtune.run.settings import RunSettings
from tests.conftest import command, status
from tests.test_floors import MODULES

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egnp.exe\udcff"


def test_control_characters_are_printed_as_numbers(capsys):
    echo(f"images/{EVIL}.png\nnext", err=True)
    said = capsys.readouterr().err
    assert said.startswith("images/\\u001b]0;owned\\u0007\\u001b[31m") and said.endswith(".png\nnext\n")
    assert not set(said) & set(EVIL) - set(printable(EVIL))
    assert json.loads(printable(json.dumps({"a": "\x9b"}, ensure_ascii=False))) == {"a": "\x9b"}
    assert printable("größer, 日本語, \t\u200f") == "größer, 日本語, \t\u200f"


def test_everything_that_is_printed_goes_through_one_function():
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called not in ("print", "typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write"):
                continue
            if name != "config.untrusted" and ast.unparse(node) != "typer.echo(ctx.get_help())":
                found.append(f"{name}:{node.lineno}: {called}")
    assert found == []


@pytest.mark.parametrize("word", ["\x1b[31mred", "a\udcff"])
@pytest.mark.parametrize("words", [["{}"], ["lora", "{}"], ["lora", "--dataset", "{}"], ["inspect", "{}.safetensors"]])
def test_an_argument_that_is_no_text_is_one_line(words, word, capsys):
    assert status([w.format(word) for w in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith(("not UTF-8 text\n", "holds control characters\n"))
    assert said.count("\n") == 1
    assert "\x1b" not in said


@pytest.mark.fault("A file's name holds sequences that control a terminal", "They are printed as escapes.")
def test_names_of_files_are_printed_without_their_escapes(sd, pictures, tmp_path, capsys):
    (tmp_path / "bad\x1b[31m.png").write_bytes(b"none")
    (tmp_path / "bad\x1b[31m.txt").write_text("a caption")
    assert status(command(sd, tmp_path, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "bad\\u001b[31m.png" in said and "\x1b" not in said


# ---- cards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a`b", "``", "a ``` b", "line\nbreak", "`x"])
def test_code_cannot_be_left(text):
    span = code_span(text)
    ticks = span[: len(span) - len(span.lstrip("`"))]
    assert "\n" not in span and span.endswith(ticks) and ticks not in " ".join(text.split())
    block = fence(text, "sh").splitlines()
    assert block[-1] not in text and len(block[-1]) >= 3


def test_a_heading_is_one_line_without_html():
    assert heading("a\n<script>x</script> [b](c)") == r"# a \<script\>x\</script\> \[b\](c)"


@pytest.mark.fault("A prompt holds Markdown or HTML", "It stays inside its code block of the card.")
def test_prompts_and_captions_stay_in_their_place_in_a_card(tmp_path):
    prompt = "a cat\n---\n```\n# Free money\n</details><script>x</script>`` `"
    out = tmp_path / "run# owned"
    cfg = LoraConfig(dataset="d`\n# e", output_dir=out, caption=prompt, validation_prompt=[prompt])
    out.mkdir()
    folder.begin(cfg, ["lora"], False, False)
    text, _ = model_card.model_card(RunSettings.of(cfg), out, None, Origin(), {})
    card = ModelCard(text)
    assert card.data.to_dict()["instance_prompt"] == prompt
    lines, inside = [], ""
    for line in card.text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if inside:
            inside = "" if line == inside else inside
        elif len(ticks) >= 3 and not line.endswith("`"):
            inside = ticks
        else:
            lines.append(line)
    assert not inside
    assert not [line for line in lines if line.startswith(("# Free", "# e", "# owned", "---"))]
    assert "<script>" not in "".join(line for line in lines if not line.startswith("Use `"))


# ---- secrets in addresses --------------------------------------------------------------------------------

PATHS = ("--init-adapter", "--output-dir")
SIGNED = "https://host/a-{000..003}.tar?sv=2024&sig=s3cr3t%2Bvalue&X-Amz-Signature=s3cr3t"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://me:pass@host/x", "see https://me:REDACTED@host/x"),
        ("see https://ghp_0123456789abcdef@host/x", "see https://REDACTED@host/x"),
        ("git@host:x and ssh://git@host/x", "git@host:x and ssh://git@host/x"),
        (SIGNED, "https://host/a-{000..003}.tar?sv=2024&sig=REDACTED&X-Amz-Signature=REDACTED"),
        ("a photo; key=value, sks dog", "a photo; key=value, sks dog"),
        ("user/name", "user/name"),
    ],
)
def test_secrets_of_addresses_are_hidden(text, shown):
    assert hide_secrets(text) == shown
    assert hide_secrets(shown) == shown


@pytest.mark.fault("A URL holds a password", "Refused before anything is written.")
@pytest.mark.parametrize("secret", ["me:s3cr3t", "ghp_s3cr3t0123456789"])
@pytest.mark.parametrize("option", ["--dataset", "--model", "--vae", *PATHS])
def test_a_password_is_refused_before_anything_is_written(option, secret, sd, pictures, tmp_path, capsys):
    words = command(sd, pictures, tmp_path / "run")
    words = [w for w in words if w] + [option, f"https://{secret}@host/x.tar"]
    assert status(words) == 2
    said = capsys.readouterr()
    assert ("holds a password" in said.err) is (option not in PATHS) and "s3cr3t" not in said.err + said.out
    assert ("is an address; give a file or folder of this machine" in said.err) is (option in PATHS)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("A URL is signed", "The signature is on no disk and no screen.")
def test_a_signature_is_neither_recorded_nor_shown(tmp_path, capsys):
    out = tmp_path / "run"
    assert status(["lora", "--dataset", SIGNED, "--output-dir", str(out), "--dry-run"]) == 0
    assert "s3cr3t" not in capsys.readouterr().out
    cfg = LoraConfig(dataset=SIGNED, output_dir=out)
    out.mkdir()
    folder.begin(cfg, ["lora"], False, False)
    assert not [path for path in out.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert "s3cr3t" not in parsing.same_command(cfg, ["sdtune", "lora"]) + RunSettings.of(cfg).to_yaml()
    (out / "metrics.jsonl").write_text("{}\n")
    renewed = cfg.model_copy(update={"dataset": SIGNED.replace("s3cr3t", "other")})
    assert folder.differences(renewed, out / "config.yaml") == []
    assert status(["lora", "--config", str(out / "config.yaml")]) == 2
    assert "its signature was left out of the record" in capsys.readouterr().err


def test_a_signature_is_not_written_for_several_processes(tmp_path, capsys):
    words = ["lora", "--dataset", SIGNED, "--output-dir", str(tmp_path / "run"), "--num-processes", "2"]
    assert status(words) == 2
    said = capsys.readouterr().err
    assert "its address holds a secret" in said and "s3cr3t" not in said
    assert not (tmp_path / "run").exists()
