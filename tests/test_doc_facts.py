"""Sentences of the documentation that state facts about the code: each is read from its page and held against it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdtune.config import fields
from sdtune.config.commands import methods, verbs
from sdtune.config.sections import Launch, Options, UserError
from sdtune.config.untrusted import hide_secrets, printable
from sdtune.conversion.convert import notes_of
from sdtune.models.formats import AdapterFile, Embedding, keys, kohya, write
from sdtune.models.formats.files import HOLD_WORDS
from sdtune.run import artefacts, folder
from tests.test_other_tools import ATTENTION, KINDS, lora
from tools.make_docs import ROOT


def page(name):
    """A page with its lines joined, so that a sentence is found wherever it breaks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def said(name, sentence):
    """What the groups of an expression find on a page, which has to say it once."""
    (found,) = re.findall(sentence, page(name))
    return found


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def sources():
    return {file: file.read_text(encoding="utf-8") for file in (ROOT / "sdtune").rglob("*.py")}


# ---- docs/formats.md -----------------------------------------------------------------------------------


def what_sd_scripts_ignores():
    """Each name gets a note of `convert`, and other modules get none."""
    told = quoted(
        said("docs/formats.md", r"sd-scripts' own reader ignores ([^:]*): `convert` prints a note for each file")
    )
    assert told == ["dora_scale", *kohya.UNREAD]
    torch.manual_seed(0)
    for name in (*kohya.UNREAD, "conv_norm_out", ATTENTION):
        notes = " ".join(notes_of(AdapterFile({"unet": {name: lora(16, 16)}}), "kohya"))
        assert (f"sd-scripts' own reader ignores {name}," in notes) is (name in kohya.UNREAD)
    assert "ignores DoRA's magnitudes," in " ".join(notes_of(AdapterFile({"unet": KINDS["dora"]()}), "kohya"))
    assert [notes_of(AdapterFile({"unet": KINDS["dora"]()}), to) for to in ("diffusers", "peft")] == [[], []]


def what_each_format_holds(tmp_path):
    """The rows of kinds, each written in every format."""
    torch.manual_seed(0)
    columns = {ATTENTION: replace(lora(16, 16, dora=True), axis=1)}
    of_row = {
        "LoRA, LoCon": [KINDS["lora"](), KINDS["locon"]()],
        "DoRA, norms of rows": [KINDS["dora"]()],
        "DoRA, norms of columns (early LyCORIS)": [columns],
        "LoHa, LoKr": [KINDS["loha"](), KINDS["lokr"]()],
    }
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", (ROOT / "docs/formats.md").read_text(), re.MULTILINE))
    for row, adapters in of_row.items():
        for to, cell in zip(("diffusers", "peft", "kohya", "comfyui"), rows[row].split(" | "), strict=True):
            for number, modules in enumerate(adapters):
                try:
                    write(tmp_path / f"{row[:4]}-{to}-{number}", AdapterFile({"unet": modules}), to)
                    held = "yes"
                except UserError:
                    held = "no"
                assert cell.startswith(held), (row, to)
    cells = rows["Words in an adapter file"].split(" | ")
    held = [to for to, cell in zip(("diffusers", "peft", "kohya", "comfyui"), cells, strict=True) if cell[:2] != "no"]
    assert held == list(HOLD_WORDS)
    word = Embedding("sks", {"text_encoder": torch.zeros(1, 16)}, {}, "")
    adapter = AdapterFile({"unet": KINDS["lora"]()}, words=(word,))
    assert [bool(notes_of(adapter, to)) for to in ("diffusers", "peft", *HOLD_WORDS)] == [True, True, False, False]


def what_is_no_low_rank_change():
    told = quoted(said("docs/formats.md", r"\| ([^|]*): complete weights, biases, norms \| refused"))
    assert told == list(keys.FULL)


# ---- docs/resume.md ------------------------------------------------------------------------------------


def what_export_steps_keeps(tmp_path):
    """Copies of the artefact in the folder named, which no upload holds, and which `--overwrite` alone removes."""
    told = said("docs/resume.md", r"`--export-steps (\d+)` keeps a copy in `(exports/step-\d+)/`, `(step-\d+)/`")
    never = said("docs/resume.md", r"They are never uploaded, and (removed by `--overwrite` alone)\.")
    assert never and "export_steps" in {name for config in methods() for name in config.model_fields}
    weights = [Path("model.safetensors")]

    def export(out):
        (out / weights[0]).write_bytes(b"x")
        return [out / weights[0]]

    recipe = SimpleNamespace(eval=lambda: None, train=lambda: None, export=export)
    for step in (int(told[0]), 2 * int(told[0])):
        artefacts.export_copy(recipe, tmp_path, step)
    artefacts.export_last(recipe, tmp_path, 1000)
    kept = [tmp_path / told[1], tmp_path / "exports" / told[2]]
    assert sorted((tmp_path / "exports").iterdir()) == kept and all((k / weights[0]).is_file() for k in kept)
    uploads = (ROOT / "sdtune/publish/publish.py").read_text()
    assert "exports" not in uploads and "exports" not in (ROOT / "sdtune/publish/model_card.py").read_text()
    folder.discard(tmp_path)
    assert not (tmp_path / "exports").exists()


# ---- SECURITY.md ---------------------------------------------------------------------------------------


def options_that_security_names():
    known = {fields.flag(name) for kind in (Launch, Options) for name in kind.model_fields}
    for command in (*methods(), *verbs()):
        known |= {fields.flag(name) for name in fields.names_of(command)}
    named = set(re.findall(r"`(--[a-z-]+)", page("SECURITY.md")))
    assert named and named <= known
    assert "It is never an option" in page("SECURITY.md")
    tokens = {name for name in known if "token" in name}
    assert not {name for name in tokens if "hub" in name or "hf" in name or "auth" in name}, tokens


def no_code_of_others_runs():
    assert "`trust_remote_code` is never set" in page("SECURITY.md")
    assert [file for file, text in sources().items() if "trust_remote_code" in text] == []
    opened = said("SECURITY.md", r"no pickle is opened, except the published (weights of Inception)")
    read = {file.name: text for file, text in sources().items() if re.search(r"(?<!\()torch\.load\(", text)}
    assert opened and set(read) == {"inception.py"}
    assert re.findall(r"torch\.load\([^)]*\)", read["inception.py"]) == [
        'torch.load(file, map_location="cpu", weights_only=True)'
    ]
    assert [file for file, text in sources().items() if re.search(r"pickle\.loads?\(|(?<!\w)eval\(['\"f]", text)] == []


def how_text_and_addresses_are_shown():
    row = said("SECURITY.md", r"shows `(\\u001b)` for an escape")
    assert printable("\x1b") == row
    for name in ("?sig=", "?X-Amz-Signature=", "?token="):
        assert name.strip("?=").lower() in page("SECURITY.md").lower()
        assert hide_secrets(f"https://host/a{name}abc") == f"https://host/a{name}REDACTED"


FACTS = (
    what_sd_scripts_ignores,
    what_each_format_holds,
    what_is_no_low_rank_change,
    what_export_steps_keeps,
    options_that_security_names,
    no_code_of_others_runs,
    how_text_and_addresses_are_shown,
)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
def test_what_the_pages_say_is_so(fact, tmp_path):
    fact(tmp_path) if "tmp_path" in fact.__code__.co_varnames[: fact.__code__.co_argcount] else fact()
