"""What every base model is held to. A new one adds a row to ``BASES``, its tiny pipeline by that name, a plain loss."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftConfig
from peft.tuners.lycoris_utils import LycorisLayer
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.methods.reflow import ReflowConfig
from sdtune.config.methods.text_to_image import TextToImageConfig
from sdtune.models import families, formats
from sdtune.models.attach import Layers, attach, published_name
from sdtune.recipes.finetune import FineTune
from sdtune.recipes.lora import Lora
from sdtune.recipes.reflow import Reflow
from sdtune.recipes.text_to_image import TextToImage
from sdtune.run.usage import EMBEDDING
from sdtune.training.engine import Engine
from sdtune.training.memory_estimate import Alone
from sdtune.training.prepare import prepare_modules
from tests import ranks
from tests.conftest import status
from tests.families import plain

FILE = "pytorch_lora_weights.safetensors"


SMALL = {"height": 32, "width": 32}
SMALL_PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
"""What an upscaler enlarges."""


@dataclass(frozen=True)
class Base:
    """A row of the contract.

    Attributes:
        loss: of a batch, written out.
        guided: the stock call's arguments for a guidance scale of 3.
        size: the stock call's arguments for an image of 32 x 32 pixels.
    """

    loss: Callable[..., torch.Tensor]
    guided: dict[str, Any]
    size: dict[str, Any] = field(default_factory=lambda: SMALL)


BASES = {
    "sdxl": Base(plain.sdxl, {"guidance_scale": 3.0}),
    "sdxl-refiner": Base(
        plain.sdxl_refiner, {"guidance_scale": 3.0}, {"image": torch.zeros(1, 4, 16, 16), "strength": 1.0}
    ),
    "upscaler": Base(plain.upscaler, {"guidance_scale": 3.0}, {"image": SMALL_PICTURE}),
    "sd3": Base(plain.sd3, {"guidance_scale": 3.0}),
    "z-image": Base(plain.z_image, {"guidance_scale": 2.0}),
    "flux-2-klein": Base(plain.flux_2_klein, {"guidance_scale": 3.0}),
    "flux-2": Base(plain.flux_2, {"guidance_scale": 3.0}),
    "flux": Base(plain.flux, {"guidance_scale": 3.0}),
    "flux-kontext": Base(plain.flux, {"guidance_scale": 3.0}, SMALL | {"max_area": 32 * 32}),
    "chroma": Base(plain.chroma, {"guidance_scale": 3.0}),
    "qwen-image": Base(plain.qwen_image, {"true_cfg_scale": 3.0, "negative_prompt": " "}),
}


TEXT_TRAINS = ("sdxl", "sdxl-refiner", "upscaler", "sd3", "flux", "flux-kontext")


@pytest.fixture(params=BASES)
def base(request) -> str:
    return request.param


def recipe_of(folder: Path, pictures: Path, tmp_path: Path, **options: Any) -> Lora:
    """``sdtune lora`` on a base, with adapters that change something."""
    families.silence_libraries()
    settings = {"resolution": 32, "random_flip": True, "output_dir": tmp_path / "run", "cache": False} | options
    cfg = LoraConfig(model=str(folder), dataset=str(pictures), **settings)
    torch.manual_seed(0)
    recipe = Lora(cfg, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in recipe.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return recipe.train()


def batch_of(recipe: FineTune) -> dict[str, Any]:
    dataset = recipe.dataset(4, lambda line: None)
    return default_collate([dataset[position] for position in range(4)])


def test_loss_and_gradients_are_those_of_the_formulas(base, bases, pictures, tmp_path):
    recipe = recipe_of(bases(base), pictures, tmp_path, center_crop=False)
    batch = batch_of(recipe)
    loss = recipe(batch)
    loss.mean().backward()
    part = recipe.family.denoiser_name
    ours = {name.partition(".")[2]: p for name, p in recipe.named_parameters() if p.requires_grad}

    pipe = DiffusionPipeline.from_pretrained(bases(base))
    denoiser = getattr(pipe, part).requires_grad_(False)
    targets = recipe.family.adapted_modules(part, [])
    denoiser.add_adapter(PeftConfig(r=4, lora_alpha=4, target_modules=targets[0] if len(targets) == 1 else targets))
    theirs = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    expected = BASES[base].loss(pipe, batch)
    expected.mean().backward()

    assert (loss - expected).abs().max() < 1e-6
    for name, parameter in theirs.items():
        assert parameter.grad.abs().max() > 0, name
        assert (ours[name].grad - parameter.grad).abs().max() < 1e-4 * parameter.grad.abs().max(), name


def test_every_weight_that_trains_gets_a_gradient(base, bases, pictures, tmp_path):
    """Processes that train together wait for the gradient of each."""
    recipe = recipe_of(bases(base), pictures, tmp_path, train_text_encoder=base in TEXT_TRAINS)
    recipe(batch_of(recipe)).mean().backward()
    cfg = TextToImageConfig(model=str(bases(base)), dataset=str(pictures), resolution=32, cache=False)
    everything = TextToImage(cfg, torch.device("cpu")).train()
    everything(batch_of(everything)).mean().backward()
    for method in (recipe, everything):
        assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_reflow_learns_where_the_base_alone_goes(base, bases, pictures, tmp_path):
    """Whatever its adapters say; every flow is straightened by the same recipe."""
    if base.startswith(("sdxl", "upscaler")):
        pytest.skip("no flow")
    options = {"resolution": 32, "cache": False, "lora": True, "rank": 2, "teacher_steps": 2}
    cfg = ReflowConfig(model=str(bases(base)), dataset=str(pictures), **options)
    recipe = Reflow(cfg, torch.device("cpu")).train()
    batch = batch_of(recipe)
    text, t, scale = recipe.family.conditioning(batch), torch.full((4,), 0.7), torch.full((4,), recipe.scale)

    def teacher():
        with torch.no_grad():
            return recipe.guided(batch["noise"], t, text, scale)

    before = teacher()
    with torch.no_grad():
        for name, parameter in recipe.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    assert torch.equal(before, teacher())
    assert not torch.equal(before, recipe.family.predict(batch["noise"], t, text))
    recipe(batch).mean().backward()
    assert [name for name, p in recipe.named_parameters() if p.requires_grad and p.grad is None] == []


def test_cached_and_uncached_agree(base, bases, pictures, tmp_path):
    losses = []
    for cache in (False, True):
        recipe = recipe_of(bases(base), pictures, tmp_path, cache=cache)
        batch = batch_of(recipe)
        assert ("caption" in batch, "moments" in batch) == (not cache, cache)
        with torch.no_grad():
            losses.append(recipe(batch))
    assert (losses[0] - losses[1]).abs().max() < 1e-6


@pytest.mark.parametrize("base", ["sd3", "chroma"])
def test_without_autocast_the_gradients_in_half_precision_are_near_those_in_full(base, bases, pictures, tmp_path):
    """In fp16: transformers round the timestep to the precision of their weights, and bf16 has 8 bits for it."""
    full = recipe_of(bases(base), pictures, tmp_path)
    full(batch_of(full)).mean().backward()
    half = recipe_of(bases(base), pictures, tmp_path, mixed_precision="fp16")
    prepare_modules(half, half.cfg, torch.device("cpu"))
    engine = Engine(half, half.cfg, Alone(torch.device("cpu")))
    loss, _ = engine(batch_of(half))
    engine.backward(loss.mean())
    assert engine.halves
    grads = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
    found = {name: p.grad / engine.scaler.get_scale() for name, p in half.named_parameters() if name in grads}
    errors = sorted(((found[name] - g).norm() / g.norm()).item() for name, g in grads.items())
    assert errors[len(errors) // 2] < 0.1


def command(method: str, base: Path, pictures: Path, out: Path, *options: str) -> list[str]:
    """A command line of two steps on one image each, unless the options say otherwise."""
    settings = {"--steps": "2", "--train-batch-size": "1", "--num-validation-images": "0"}
    settings |= {"--resolution": "32", "--dataloader-num-workers": "0"}
    words = [word for flag, value in settings.items() if flag not in options for word in (flag, value)]
    return [method, "--model", str(base), "--dataset", str(pictures), "--output-dir", str(out), *words, *options]


def asked_size(base: str, folder: Path) -> list[str]:
    """The words of ``sdtune sample`` for an image of 32 x 32 pixels."""
    if BASES[base].size.get("image") is not SMALL_PICTURE:
        return ["--width", "32", "--height", "32"]
    SMALL_PICTURE.save(folder / "small.png")
    return ["--image", str(folder / "small.png")]


def train(method: str, base: Path, pictures: Path, out: Path, *options: str) -> None:
    assert status(command(method, base, pictures, out, *options)) == 0


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def stock_pixels(folder: Path, base: str, run: Path | None = None) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if run:
        pipe.load_lora_weights(run)
    options = {"num_inference_steps": 2, "generator": torch.Generator("cpu").manual_seed(5)}
    return pixels(pipe(prompt="a red circle", **options, **BASES[base].size, **BASES[base].guided).images[0])


def test_the_adapter_gives_the_stock_image(base, bases, pictures, tmp_path):
    folder, run = bases(base), tmp_path / "run"
    train("lora", folder, pictures, run, "--learning-rate", "0.3", "--alpha", "16")
    words = ["sample", "--model", str(folder), "--adapter", str(run), "--prompt", "a red circle", "--steps", "2"]
    words += ["--seed", "5", "--guidance-scale", "3", *asked_size(base, tmp_path)]
    assert status([*words, "--output-dir", str(tmp_path / "images")]) == 0
    ours = pixels(Image.open(tmp_path / "images" / "00000.png"))
    assert np.array_equal(ours, stock_pixels(folder, base, run))
    assert np.abs(ours - stock_pixels(folder, base)).max() >= 20, "the adapter changes next to nothing"


def test_every_tensor_of_the_adapter_arrives(base, bases, pictures, tmp_path):
    recipe = recipe_of(bases(base), pictures, tmp_path)
    recipe.export(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(bases(base))
    pipe.load_lora_weights(tmp_path)
    arrived = {n: p for n, p in getattr(pipe, recipe.family.denoiser_name).named_parameters() if "lora_" in n}
    sent = load_file(tmp_path / FILE)
    trained = {n.partition(".")[2]: p for n, p in recipe.named_parameters() if p.requires_grad}
    assert len(arrived) == len(sent) == len(trained) > 0
    for name, parameter in trained.items():
        assert torch.equal(arrived[name.replace(".default.", ".default_0.")], parameter), name


KIND = {"sdxl": "loha", "sd3": "loha", "flux": "loha"}
"""The kind beside LoRA that a base is tried with; the others with LoKr."""


def test_the_other_kinds_train_and_come_back_from_their_file(base, bases, pictures, tmp_path):
    kind = KIND.get(base, "lokr")
    recipe = recipe_of(
        bases(base), pictures, tmp_path, adapter=kind, rank=1, train_text_encoder=base in ("sdxl", "sd3")
    )
    with torch.no_grad():
        for parameter in recipe.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    recipe(batch_of(recipe)).mean().backward()
    assert [name for name, p in recipe.named_parameters() if p.requires_grad and p.grad is None] == []
    recipe.export(tmp_path)
    found = formats.read(tmp_path)
    layers = Layers(DiffusionPipeline.from_pretrained(bases(base)).components)
    _, hooks = attach(layers, "a", found, 1.0, "--adapter")
    assert found.parts.keys() == recipe.trained.keys()
    for part, model in recipe.trained.items():
        trained = {published_name(part, n): m for n, m in model.named_modules() if isinstance(m, LycorisLayer)}
        assert found.parts[part].keys() == trained.keys()
        for name, layer in trained.items():
            change = found.parts[part][name].delta(layer.weight.shape)
            torch.testing.assert_close(change.float(), layer.get_delta_weight("default").detach())
    assert len(hooks) == len(found.modules())


def test_all_weights_train_and_load_in_the_stock_class(base, bases, pictures, tmp_path):
    folder, run = bases(base), tmp_path / "run"
    train("text-to-image", folder, pictures, run, "--learning-rate", "1e-3", "--no-cache")
    before, after = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(run)
    assert type(after) is type(before)
    part = "unet" if hasattr(before, "unet") else "transformer"
    pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    for name, module in before.components.items():
        if isinstance(module, torch.nn.Module) and name != part:
            other = after.components[name].state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in module.state_dict().items()), name
    shutil.rmtree(run)


FLOW = ["--random-flip", "--caption-dropout", "0.3", "--weighting-scheme", "logit_normal"]
WORD = ["--placeholder-token", "<thing>", "--num-vectors", "2", "--initializer-token", "red", "--use-ema"]
RUNS = {
    "sdxl": ["lora", "--train-text-encoder", "--random-flip", "--no-center-crop", "--snr-gamma", "5"],
    "sdxl, a word": ["textual-inversion", *WORD],
    "upscaler": ["lora", "--random-flip", "--no-center-crop"],
    "sd3": ["lora", "--train-text-encoder", "--random-flip"],
    "z-image": ["lora", *FLOW, "--adapter", "lokr", "--decompose-factor", "2", "--rank", "2"],
    "flux-2-klein": ["lora", *FLOW],
    "flux": ["lora", "--train-text-encoder", "--resolution-shift"],
    "chroma": ["lora", *FLOW],
    "qwen-image": ["lora", *FLOW],
}
"""Runs that are killed and divided: the method, and what it draws. The bases left out are near relatives of others."""


@pytest.mark.processes
@pytest.mark.parametrize("row", RUNS)
def test_a_run_that_is_killed_and_one_of_two_processes_learn_the_same(row, bases, pictures, tmp_path):
    method, *draws = RUNS[row]
    folder, file = bases(row.partition(",")[0]), EMBEDDING if method == "textual-inversion" else FILE
    options = [*draws, "--adam-epsilon", "1e-3"]
    whole, cut, two = (tmp_path / run for run in ("whole", "cut", "two"))
    train(method, folder, pictures, whole, *options, "--train-batch-size", "2")
    words = command(method, folder, pictures, cut, *options, "--train-batch-size", "2", "--checkpointing-steps", "1")
    first = cut / "checkpoints" / "step-000001"
    code, _ = ranks.interrupt(words, tmp_path / "killed", signal.SIGKILL, first.exists)
    assert code == -signal.SIGKILL
    assert not (cut / file).exists()
    assert status(words) == 0
    ranks.train(2, command(method, folder, pictures, two, *options), tmp_path / "said")
    expected, continued, divided = (load_file(run / file) for run in (whole, cut, two))
    assert [key for key in expected if not torch.equal(expected[key], continued[key])] == []
    assert max((expected[key] - divided[key]).abs().max().item() for key in expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(
            ("sd3", option)
            for option in ("--snr-gamma=5", "--timestep-bias-strategy=later", "--rescale-betas-zero-snr")
        ),
        *(("sdxl", option) for option in ("--weighting-scheme=mode", "--timestep-shift=3", "--no-t5")),
        ("z-image", "--guidance-embedding=1"),
        ("z-image", "--logit-mean=1"),
        ("sd3", "--mode-scale=1"),
    ],
)
def test_an_option_that_means_nothing_for_the_base_is_refused_by_name(name, option, bases, pictures, tmp_path, capsys):
    words = ["lora", "--model", str(bases(name)), "--dataset", str(pictures), "--output-dir", str(tmp_path / "run")]
    assert status([*words, "--resolution", "32", option]) == 2
    assert option.partition("=")[0].replace("--no-", "--") in capsys.readouterr().err


def test_a_base_with_the_preconditioning_of_edm_is_refused(bases, pictures, tmp_path, capsys):
    base = shutil.copytree(bases("sdxl"), tmp_path / "playground")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "EDMEulerScheduler"))
    assert status(["check", *command("lora", base, pictures, tmp_path / "run")]) == 2
    assert "its scheduler is EDMEulerScheduler" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux-2-klein", "flux-2", "flux"])
def test_a_negative_prompt_is_refused_where_there_is_none(name, bases, tmp_path, capsys):
    words = ["sample", "--model", str(bases(name)), "--prompt", "a red circle", "--negative-prompt", "blue"]
    assert status([*words, "--output-dir", str(tmp_path / "images")]) == 2
    assert "--negative-prompt" in capsys.readouterr().err


def test_memory_is_estimated_without_a_weight(base, bases, pictures, tmp_path, capsys):
    words = ["check", "lora", "--model", str(bases(base)), "--dataset", str(pictures), "--resolution", "32"]
    assert status([*words, "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "activations" in said
    assert "no figure" not in said


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui"])
def test_an_adapter_of_a_transformer_is_converted_and_checked_in_its_base(to, bases, pictures, tmp_path):
    folder, run = bases("sd3"), tmp_path / "run"
    # PEFT names the modules of a CLIPTextModelWithProjection as they are in memory, which the file does not tell
    recipe_of(folder, pictures, run, train_text_encoder=to != "peft").export(tmp_path)
    out = tmp_path / ("peft" if to == "peft" else "out.safetensors")
    assert status(["convert", str(tmp_path / FILE), str(out), "--to", to, "--model", str(folder)]) == 0
    assert status(["inspect", str(out)]) == 0


@pytest.mark.parametrize("name", ["sdxl", "flux", "chroma"])
def test_kohya_has_a_layout_for_some(name, bases, pictures, tmp_path):
    recipe_of(bases(name), pictures, tmp_path / "run", train_text_encoder=name != "chroma").export(tmp_path)
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    assert status(["convert", str(tmp_path / FILE), str(out), "--to", "kohya", "--model", str(bases(name))]) == 0
    assert all(key.startswith("lora_") for key in load_file(out))
    assert status(["convert", str(out), str(back), "--to", "diffusers", "--model", str(bases(name))]) == 0


@pytest.mark.parametrize("name", ["sd3", "flux-2", "z-image"])
def test_kohya_has_no_layout_for_other_transformers(name, bases, pictures, tmp_path, capsys):
    recipe_of(bases(name), pictures, tmp_path / "run").export(tmp_path)
    assert status(["convert", str(tmp_path / FILE), str(tmp_path / "out.safetensors"), "--to", "kohya"]) == 2
    assert "--to kohya: of transformers it has a layout for the LoRA of FLUX.1" in capsys.readouterr().err
