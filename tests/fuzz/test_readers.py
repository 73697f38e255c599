"""Whatever a file holds, its reader gives a value or a `UserError`: never another exception, never a long wait.

Some examples of each in every run of the tests, always the same; ``pytest -m fuzz`` tries a thousand new ones of each.
What it finds becomes an ``example`` here or a row where such files are tested.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from sdtune.config import parsing
from sdtune.config.commands import methods
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import RunFailed, UserError
from sdtune.data import ShardStream, load_images, open_images
from sdtune.data.images import decode, inspect_image
from sdtune.models import families, formats
from sdtune.models.formats import embedding
from tests.tars import drawn, pack

pytestmark = pytest.mark.fuzz

TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["1e-4", "no", "null", "~", "2024-13-01", "- a", "{a: b}", "%x"])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-9, 2**70), st.floats(), TEXTS)
VALUES = st.recursive(LEAVES, lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(TEXTS, of, max_size=3)))


def value_or_advice(read: Callable[..., Any], *given: Any) -> Any:
    """What a reader gives, or ``None`` when it refuses in words."""
    try:
        return read(*given)
    except (UserError, RunFailed) as error:
        advice = str(error)
    assert advice.strip() and "Traceback" not in advice
    return None


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file of which bytes were changed, lost, added or put twice."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from((1, 2, 8, 100, 10**9))))
        how = draw(st.sampled_from(("change", "drop", "insert", "twice")))
        if how == "change":
            content[start : start + 4] = draw(st.binary(min_size=1, max_size=4))
        elif how == "drop":
            del content[start:end]
        elif how == "insert":
            content[start:start] = draw(st.binary(max_size=9))
        else:
            content[start:start] = content[start:end][:1000]
    return bytes(content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---- configs


@given(
    st.sampled_from(methods()),
    st.dictionaries(st.one_of(st.sampled_from(sorted(LoraConfig.model_fields)), TEXTS), VALUES, max_size=4),
)
def test_settings_in_a_file(place, config, options):
    file = place / "settings.yaml"
    file.write_text(json.dumps(options))
    cfg = value_or_advice(parsing.resolve, config, str(file), {"dataset": "d"}, [])
    if cfg is not None:
        file.write_text(parsing.to_yaml(cfg))
        assert parsing.resolve(config, str(file), {}, []) == cfg


MARKS = [
    "*a",
    "&a ",
    "<<: ",
    "? ",
    "!!binary x",
    "!!float ",
    "\n",
    "\n",
    "\u2028",
    "\x85",
    "\ufeff",
    "0b_",
    "1_000",
    ".inf",
]
PIECES = st.sampled_from([*(f"{name}: " for name in LoraConfig.model_fields), *"[]{}:&*!|>\n\t ", *MARKS])


@pytest.mark.fault("A config file holds any text", "A config, or lines that say what is wrong and where.")
@given(st.one_of(st.lists(st.one_of(PIECES, TEXTS), max_size=12).map("".join), st.text()))
def test_a_file_of_any_text(place, text):
    file = place / "any.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    cfg = value_or_advice(parsing.resolve, LoraConfig, str(file), {"dataset": "d"}, [])
    if cfg is not None:
        file.write_text(parsing.to_yaml(cfg))
        assert parsing.resolve(LoraConfig, str(file), {}, []) == cfg


# ---- images


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("P" if form == "GIF" else "RGB").save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.fault("An image holds any bytes", "An image, or the reason why not.")
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]).map(encoded).flatmap(damaged))
def test_images(data):
    found = inspect_image(data)
    if not found.problem:
        assert decode(data).size == (found.width, found.height)


# ---- adapters and embeddings

WEIGHTS = st.lists(st.sampled_from([1, 2, 4, 16]), max_size=4).map(lambda shape: torch.ones(shape))
NAMES = st.tuples(
    st.sampled_from(["unet.", "lora_unet_", "diffusion_model.", "text_encoder.", "lora_te_", "base_model.model.", ""]),
    st.sampled_from(
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block_attentions_0_proj_in", "x"]
    ),
    st.sampled_from(
        [".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"]
    )
    | st.sampled_from([".hada_w1_a", ".hada_w1_b", ".hada_t1", ".lokr_w1", ".lokr_w2_a", "_lora.down.weight", ""]),
).map("".join)


@given(st.dictionaries(NAMES, WEIGHTS, max_size=6), st.dictionaries(TEXTS, TEXTS, max_size=2))
def test_adapters_of_any_tensors(place, tensors, about):
    file = place / "adapter.safetensors"
    save_file(tensors, file, {key.encode(errors="replace").decode(): value for key, value in about.items()})
    adapter = value_or_advice(formats.read, file)
    if adapter is not None:
        value_or_advice(formats.write, place / "written.safetensors", adapter, "kohya")


WHOLE_ADAPTER = save(
    {f"unet.down_blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"},
    {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})},
)


@pytest.mark.fault("An adapter or embedding holds any bytes", "It is read, or refused in words.")
@given(damaged(WHOLE_ADAPTER))
def test_damaged_adapters(place, content):
    file = place / "damaged.safetensors"
    file.write_bytes(content)
    value_or_advice(formats.read, file)
    value_or_advice(embedding.read, file)


@given(st.dictionaries(st.one_of(TEXTS, st.sampled_from(["emb_params", "clip_l", "clip_g"])), WEIGHTS, max_size=3))
def test_embeddings(place, tensors):
    file = place / "embedding.safetensors"
    save_file({key.encode(errors="replace").decode(): value for key, value in tensors.items()}, file)
    value_or_advice(embedding.read, file)


# ---- data sets


@pytest.fixture(scope="module")
def images(place):
    folder = place / "images"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (40, 40), (k, 0, 0)).save(folder / f"{k}.png")
    return folder


ROWS = st.fixed_dictionaries(
    {},
    optional={"file_name": st.sampled_from(["0.png", "1.png", "./2.png", "../0.png", "/0.png", "", 3]), "text": VALUES},
)


@given(st.lists(st.one_of(ROWS.map(json.dumps), TEXTS), max_size=5).map("\n".join))
@example('{"file_name": "0.png", "text": "\\ud800"}')
def test_tables_of_lines(images, text):
    (images / "metadata.jsonl").write_bytes(text.encode(errors="surrogatepass"))
    try:
        value_or_advice(load_images, LoraConfig(dataset=str(images), resolution=64))
    finally:
        (images / "metadata.jsonl").unlink()


@given(damaged(b'file_name,text\n0.png,"a circle, red"\n1.png,b\n2.png,\n'))
def test_tables_of_cells(images, content):
    (images / "metadata.csv").write_bytes(content)
    try:
        value_or_advice(load_images, LoraConfig(dataset=str(images), resolution=64))
    finally:
        (images / "metadata.csv").unlink()


def whole_tar() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder) / "whole.tar", *drawn(0, 3)).read_bytes()


@pytest.mark.fault("A tar holds any bytes", "It is read, or refused in words.")
@given(damaged(whole_tar()))
def test_tars(place, content):
    folder = place / "tars"
    folder.mkdir(exist_ok=True)
    (folder / "000000.tar").write_bytes(content)
    cfg = LoraConfig(dataset=str(folder), resolution=64)
    shards = value_or_advice(open_images, cfg)
    if shards is not None:
        stream = ShardStream(cfg, shards, 1)
        for position in range(3):
            value_or_advice(lambda at: stream.pixels(stream[at]), position)


# ---- model folders


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, Any]:
    """A file of a pipeline, and what becomes of it: lost, cut to a share, or a key of its JSON with another value."""
    files = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    change = draw(st.one_of(st.none(), st.floats(0, 1), st.tuples(st.integers(0, 99), LEAVES)))
    files.append("text_encoder/config.json")
    if isinstance(change, tuple):
        return draw(st.sampled_from(files)), change
    others = ["tokenizer/vocab.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    return draw(st.sampled_from([*files, *others])), change


@pytest.mark.fault("A file of a model folder is lost, cut short or changed", "It loads, or is refused in words.")
@given(edits())
@example(("model_index.json", 0.5))
@example(("model_index.json", (6, 1)))
@settings(max_examples=max(8, settings.default.max_examples // 20))
def test_model_folders(place, sd, edit):
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sd, folder)
    name, change = edit
    file = folder / name
    if change is None:
        file.unlink()
    elif isinstance(change, float):
        file.write_bytes(file.read_bytes()[: int(change * file.stat().st_size)])
    elif file.suffix == ".json":
        content = json.loads(file.read_text())
        content[sorted(content)[change[0] % len(content)]] = change[1]
        file.write_text(json.dumps(content))
    cfg = LoraConfig(dataset="d", model=str(folder))
    value_or_advice(lambda: families.load(cfg, torch.device("cpu"), torch.float32).pipeline())
