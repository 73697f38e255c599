"""`sdtune sample`: the images are those of stock diffusers, adapters arrive whole, bad input is one line."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.schedulers import SCHEDULERS, make_scheduler
from sdtune.models.loading import load_adapters, load_pipeline, split_weight
from sdtune.sampling.prompts import Prompt, parse
from sdtune.sampling.sample import generate, sample
from tests.tinysd import save_tiny_sd, tiny_sd

torch.set_num_threads(1)  # models this small are several times slower on two
PROMPTS = ["a red circle", "a blue square", "a green dog"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_sd(tmp_path_factory.mktemp("base") / "tiny-sd")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A file as the LoRA recipe writes it, with an update large enough to see."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = tiny_sd().unet
    unet.add_adapter(PeftConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    g = torch.Generator().manual_seed(1)
    state = {k: torch.randn(v.shape, generator=g) for k, v in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def draw(pipe, prompts=PROMPTS, seed=7, **options):
    seeds = [seed + k for k in range(len(prompts))]
    return generate(pipe, prompts, seeds, **{"steps": 3, "guidance_scale": 4.0, "batch_size": 1} | options)


def pixels(images):
    return [image.tobytes() for image in images]


def test_each_image_is_the_one_stock_diffusers_draws(pipe):
    ours = draw(pipe, negative_prompt="a cat")
    for k, prompt in enumerate(PROMPTS):
        stock = pipe(
            prompt,
            num_inference_steps=3,
            guidance_scale=4.0,
            negative_prompt="a cat",
            generator=torch.Generator("cpu").manual_seed(7 + k),
        ).images[0]
        assert ours[k].tobytes() == stock.tobytes()
    assert pixels(draw(pipe, seed=8))[0] != pixels(ours)[0]


def test_batches_change_no_noise(pipe):
    one, three = draw(pipe), draw(pipe, batch_size=3)
    for a, b in zip(one, three, strict=True):  # sums in another order may round a pixel otherwise
        a, b = (torch.tensor(list(x.tobytes()), dtype=torch.int16) for x in (a, b))
        assert (a - b).abs().max() <= 1


def test_drawing_leaves_training_as_it_was(pipe):
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    before = [m.training for m in pipe.unet.modules()]
    draw(pipe, PROMPTS[:1], steps=1)
    assert [m.training for m in pipe.unet.modules()] == before
    pipe.unet.eval()


def test_progress_ends_at_one(pipe):
    shares = []
    draw(pipe, progress=shares.append, batch_size=2)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_scheduler_samples(pipe, name, prediction_type):
    own = pipe.scheduler
    if name == "lms" and find_spec("scipy") is None:
        with pytest.raises(UserError, match="pip install scipy"):
            make_scheduler(name, own)
        return
    pipe.scheduler = make_scheduler(name, type(own).from_config(own.config, prediction_type=prediction_type))
    try:
        assert torch.equal(pipe.scheduler.betas, own.betas)
        assert pipe.scheduler.config.prediction_type == prediction_type
        assert not pipe.scheduler.config.get("clip_sample")
        assert len(draw(pipe, PROMPTS[:1], steps=2)) == 1
    finally:
        pipe.scheduler = own


def test_a_scheduler_keeps_what_the_model_was_trained_on(pipe):
    base = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    ddim = make_scheduler("ddim", base)
    assert ddim.config.timestep_spacing == "trailing"
    assert ddim.alphas_cumprod[-1] == 0
    with pytest.raises(UserError, match="heun knows no zero-terminal-SNR"):
        make_scheduler("heun", base)
    base = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(UserError, match="predicts sample"):
        make_scheduler("euler-ancestral", base)


def test_the_command(base, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("a blue square\n\n a hat ≥ 漢 \n", encoding="utf-8")
    cfg = SampleConfig(
        model=str(base),
        adapter=[f"{adapter}=0.5"],
        prompt="a red circle",
        prompt_file=tmp_path / "prompts.txt",
        num_images_per_prompt=2,
        steps=2,
        scheduler="ddim",
        batch_size=1,
        output_dir=tmp_path / "out",
    )
    assert [f.name for f in sample(cfg)] == [f"{k:05d}.png" for k in range(6)]
    files = sample(cfg)
    assert files[0].name == "00006.png"
    lines = [json.loads(x) for x in (tmp_path / "out" / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 12
    assert lines[11] == {"file_name": "00011.png", "text": "a hat ≥ 漢", "seed": 5}
    assert (tmp_path / "out" / "grid.png").exists()

    stock = StableDiffusionPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = make_scheduler("ddim", stock.scheduler)
    stock.load_lora_weights(adapter, adapter_name="a")
    stock.set_adapters("a", 0.5)
    image = stock(
        "a blue square",
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(2),
    ).images[0]
    again = Image.open(files[2])
    assert again.tobytes() == image.tobytes()
    assert again.text["parameters"].startswith("a blue square\nSteps: 2, Sampler: DDIMScheduler, CFG scale: 5.0")


def test_auto_takes_the_base_of_the_run(base, adapter, tmp_path):
    (tmp_path / "config.yaml").write_text(f"model: {base}\nrank: 2\n")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
        (adapter / "pytorch_lora_weights.safetensors").read_bytes()
    )
    cfg = SampleConfig(adapter=str(tmp_path), prompt="a dog", steps=1, output_dir=tmp_path / "out")
    assert f"Model: {base}" in Image.open(sample(cfg)[0]).text["parameters"]


@torch.no_grad()
def test_weights_of_adapters(adapter, tmp_path):
    assert split_weight("runs/lora=0.8") == ("runs/lora", 0.8)
    assert split_weight("runs/a=b") == ("runs/a=b", 1.0)
    (tmp_path / "lr=1").mkdir()
    assert split_weight(f"{tmp_path}/lr=1") == (f"{tmp_path}/lr=1", 1.0)
    inputs = torch.ones(1, 4, 16, 16), 500, torch.ones(1, 77, 32)
    outputs = []
    for adapters in ([], [f"{adapter}=0"], [str(adapter)], [f"{adapter}=0.5", f"{adapter}=0.5"]):
        fresh = tiny_sd()
        load_adapters(fresh, adapters)
        outputs.append(fresh.unet(*inputs).sample)
    without, none, full, halves = outputs
    assert torch.equal(none, without)
    assert not torch.allclose(full, without, atol=1e-2)
    torch.testing.assert_close(halves, full, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda k: k.replace("unet.", "transformer."), "0 of its 32 modules are layers of the base"),
        (
            lambda k: k.replace("down_blocks.0", "down_blocks.9"),
            "of its 32 modules are layers of the base; it has no unet.down",
        ),
        (lambda k: k.replace("lora", "other"), "0 of 64 keys make up an adapter"),
    ],
)
def test_an_adapter_that_does_not_arrive_whole(adapter, tmp_path, rename, message):
    tensors = load_file(adapter / "pytorch_lora_weights.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_adapters(tiny_sd(), [str(tmp_path / "a.safetensors")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "--model nowhere/at/all: no such folder"),
        ({"model": "EMPTY"}, "not a diffusers pipeline"),
        ({"model": "sd.ckpt"}, "--model sd.ckpt: a pickle"),
        ({"model": "sd.safetensors"}, "--model sd.safetensors: no such folder or"),
        ({"adapter": "./nowhere=0.5"}, "--adapter ./nowhere: no such file"),
        ({"adapter": "EMPTY"}, "no .safetensors in it"),
        ({"adapter": "a.bin"}, "--adapter a.bin: a pickle"),
        ({"adapter": "TEXT"}, "not a safetensors file"),
        ({"prompt_file": "nowhere.txt"}, "--prompt-file nowhere.txt: No such file"),
        ({"prompt": [], "prompt_file": "BLANK"}, "no prompt in it"),
        ({"width": 33, "height": 32}, "divisible by 8"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "blank.txt").write_text("\n \n")
    places = {
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.safetensors",
        "BLANK": tmp_path / "blank.txt",
    }
    options = {k: str(places.get(v, v)) if isinstance(v, str) else v for k, v in options.items()}
    defaults = {"model": str(base), "prompt": "a dog", "steps": 1, "output_dir": tmp_path / "out"}
    with pytest.raises(UserError, match=message) as error:
        sample(SampleConfig(**defaults | options))
    assert "\n" not in str(error.value)
    assert not list(Path(tmp_path).glob("out/*"))


@pytest.mark.parametrize(
    ("line", "text", "settings"),
    [
        ("a dog", "a dog", {}),
        ("a dog -- a good one, t-shirt --", "a dog -- a good one, t-shirt --", {}),
        (
            "a dog --n a cat, blurry --w 48 --h 32 --d 7 --l 1.5 --s 1",
            "a dog",
            {
                "negative_prompt": "a cat, blurry",
                "width": 48,
                "height": 32,
                "seed": 7,
                "guidance_scale": 1.5,
                "steps": 1,
            },
        ),
        ("a dog --ar 16:9", "--ar is no option of a prompt's line; known are --n, --w", None),
        ("a dog --ss euler_a", "--ss is no option of a prompt's line; --scheduler is for all prompts", None),
        ("a dog --w 64", "--w and --h: give both", None),
        ("a dog --s many", "--s takes a whole number from 1 on, not 'many'", None),
        ("a dog --l nan", "--l takes a number", None),
        ("a dog --s", "--s takes a whole number", None),
    ],
)
def test_a_line_of_a_prompt_file(line, text, settings):
    if settings is None:
        with pytest.raises(UserError, match=f"file.txt:3: {text}"):
            parse(line, "file.txt:3")
    else:
        assert parse(line, "file.txt:3") == Prompt(text, settings)


def test_options_of_a_prompt_file_are_those_of_its_image(base, tmp_path):
    lines = ["# two of one prompt", "a dog --n a cat --w 48 --h 32 --d 7 --l 1.5 --s 1", "", "a dog"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    cfg = SampleConfig(model=str(base), prompt_file=tmp_path / "prompts.txt", steps=2, output_dir=tmp_path / "out")
    one, two = map(Image.open, sample(cfg))
    assert one.size == (48, 32) and two.size == (32, 32)
    same = {"steps": 1, "guidance_scale": 1.5, "negative_prompt": "a cat", "seed": 7, "width": 48, "height": 32}
    (alone,) = sample(SampleConfig(model=str(base), prompt=["a dog"], output_dir=tmp_path / "alone", **same))
    assert one.tobytes() == Image.open(alone).tobytes()
    assert "Negative prompt: a cat" in one.text["parameters"] and "Seed: 7" in one.text["parameters"]
    assert "Steps: 2" in two.text["parameters"] and "Negative" not in two.text["parameters"]


def test_an_adapter_is_no_base(adapter):
    with pytest.raises(UserError, match="an adapter, not a base model"):
        load_pipeline(SampleConfig(model=str(adapter / "pytorch_lora_weights.safetensors"), prompt="a"))
