"""Distilled models: their artefacts in stock diffusers, what `sdtune sample` takes from them, and what is refused."""

import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from sdtune.config import fields, yaml_text
from sdtune.config.commands import METHODS
from sdtune.config.foreign_flags import ANSWERS
from sdtune.models import families
from sdtune.models.networks import reshaped
from sdtune.run.sampling_file import Sampling
from sdtune.training import memory_estimate
from tests.conftest import status
from tests.contract import command
from tests.families import pipelines
from tests.test_cli import answer

SHORT = ["--steps", "2", "--checkpointing-steps", "0"]
RUNS = {
    "lcm": [*SHORT, "--validation-inference-steps", "2", "--num-ddim-timesteps", "25"],
    "lcm, adapters": [*SHORT, "--validation-inference-steps", "2", "--num-ddim-timesteps", "25"],
    "guidance-distillation": ["--steps", "3", "--checkpointing-steps", "0"],
    "reflow": SHORT,
    "reflow, adapters": SHORT,
    "progressive": SHORT,
    "consistency": [*SHORT, "--class-column", "text", "--validation-inference-steps", "3"],
}


def stock(name, out, base):
    """The code of the card, more or less, and the pictures of seeds 5 and 6."""
    if name == "lcm, adapters":
        pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None)
        pipe.load_lora_weights(out)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=25)
    elif name == "reflow, adapters":
        pipe = DiffusionPipeline.from_pretrained(families.resolve_model("tiny-flow"))
        pipe.load_lora_weights(out)
    else:
        pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "lcm": {"prompt": "a circle", "num_inference_steps": 2, "guidance_scale": 11.0},
        "lcm, adapters": {"prompt": "a circle", "num_inference_steps": 2, "guidance_scale": 1.0},
        "guidance-distillation": {"prompt": "a circle", "num_inference_steps": 1, "guidance_scale": 8.0},
        "reflow": {"prompt": "a circle", "num_inference_steps": 1, "guidance_scale": 0.0},
        "reflow, adapters": {"prompt": "a circle", "num_inference_steps": 1, "guidance_scale": 0.0},
        "progressive": {"num_inference_steps": 1},
        "consistency": {"class_labels": [3], "num_inference_steps": 3},
    }[name]
    if name.startswith("reflow"):  # the size of what the base draws, which the stock call cannot know
        call |= {"width": 64, "height": 64}
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]
    return [np.asarray(pipe(generator=seed, **call).images[0].convert("RGB")) for seed in seeds]


@pytest.mark.parametrize("name", RUNS)
def test_stock_diffusers_draws_what_sample_draws(name, shared, places, tmp_path, capsys):
    """With the steps, the guidance and the sampler that lie beside the artefact."""
    out = shared(name, *RUNS[name])
    what = ["--adapter" if name.endswith("adapters") else "--model", str(out)]
    more = ["--prompt", "a circle"] if name.startswith(("lcm", "reflow", "guidance")) else []
    if name == "consistency":
        more = ["--class", json.loads((out / "classes.json").read_text())[3]]
    words = ["sample", *what, *more, "--num-images-per-prompt", "2", "--seed", "5", "--batch-size", "1"]
    assert status([*words, "--output-dir", str(tmp_path)]) == 0, capsys.readouterr().err
    ours = [np.asarray(Image.open(tmp_path / f"0000{k}.png").convert("RGB")) for k in range(2)]
    for one, other in zip(ours, stock(name, out, places.sd), strict=True):
        assert np.array_equal(one, other)
    report = (out / "report.html").read_text()
    assert f"--steps {Sampling.read(out / 'sampling.json').steps}" in report


def test_the_card_has_steps_guidance_and_scheduler(shared, tmp_path):
    told = {
        "lcm": "num_inference_steps=2, guidance_scale=11.0).images[0]",
        "lcm, adapters": "LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=25",
        "guidance-distillation": "num_inference_steps=1, guidance_scale=8.0).images[0]",
        "reflow": "num_inference_steps=1, guidance_scale=0.0).images[0]",
        "reflow, adapters": "num_inference_steps=1, guidance_scale=0.0).images[0]",
        "consistency": "pipe(class_labels=[0], num_inference_steps=3).images[0]",
        "progressive": "pipe(num_inference_steps=1).images[0]",
    }
    for name, line in told.items():
        assert line in (shared(name, *RUNS[name]) / "README.md").read_text(), name


def test_a_damaged_sampling_file_is_refused_and_runs_no_code(tmp_path, capsys):
    for text in (
        "{",
        "[]",
        '{"steps": "4"}',
        '{"steps": 4, "x": 1}',
        '{"steps": 1e99}',
        '{"steps": 4, "lcm": {"y": 1}}',
        '{"steps": 4, "call": {"generator": 1}}',
    ):
        (tmp_path / "sampling.json").write_text(text)
        code, _, err = answer(capsys, "sample", "--adapter", str(tmp_path), "--model", "tiny", "--prompt", "x")
        assert code == 2 and "sampling.json" in err and err.count("\n") == 1, text


def test_the_student_of_lcm_begins_as_the_base_whatever_it_is_told(sd):
    unet = DiffusionPipeline.from_pretrained(sd, safety_checker=None).unet
    student = reshaped(unet, time_cond_proj_dim=8)
    x, text, t = torch.randn(2, 4, 16, 16), torch.randn(2, 7, unet.config.cross_attention_dim), torch.tensor([3, 900])
    told = student(x, t, encoder_hidden_states=text, timestep_cond=torch.randn(2, 8)).sample
    assert torch.equal(told, unet(x, t, encoder_hidden_states=text).sample)


WRONG = {
    "--num-ddim-timesteps 30: does not divide 1000, as do 10, 20, 25, 40, 50, 100": [
        "lcm",
        "--num-ddim-timesteps",
        "30",
    ],
    "--sampling-steps 16: does not divide the model's 1000 timesteps, as do 5, 8, 10, 20, 25, 40": [
        *("progressive", "--sampling-steps", "16", "8")
    ],
    "--sampling-steps 3: does not divide the base's 1000 timesteps": [
        *("guidance-distillation", "--sampling-steps", "3")
    ],
    "made by flow matching; sdtune reflow distils those, guidance-distillation bases of DDPM": [
        *("guidance-distillation", "--model", "tiny-flow")
    ],
    "sampling_steps: 2 is not half of 8": ["progressive", "--sampling-steps", "8", "2"],
    "--resolution 32: --model": ["progressive", "--resolution", "32"],
    "target_decay has no effect with lora": ["lcm, adapters", "--target-decay", "0.5"],
    "made by flow matching; sdtune reflow distils those, lcm bases of DDPM": ["lcm", "--model", "tiny-flow"],
    "a StableDiffusionPipeline, which is no flow; sdtune lcm distils it": ["reflow", "--model", "tiny"],
    "w_min 9 is above w_max 3": ["lcm", "--w-min", "9", "--w-max", "3"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_distilled_is_refused(message, places, tmp_path, capsys):
    recipe, *options = WRONG[message]
    code, _, err = answer(capsys, *command(recipe, places, tmp_path / "run", "--steps", "2", *options))
    assert code == 2 and " ".join(message.split()) in " ".join(err.split()), err


def test_another_length_would_move_the_phases(trained, places, tmp_path, capsys):
    run = [*SHORT, "--num-validation-images", "0", "--log-steps", "1"]
    out = trained("progressive", "run", *run)
    code, _, err = answer(capsys, *command("progressive", places, out, *run, "--steps", "8"))
    assert code == 2 and "a phase of this run is 1 steps, and would now be 4" in err and "--phase-steps 1 keeps" in err
    trained("progressive", "run", *run, "--steps", "3", "--phase-steps", "1")
    assert json.loads((out / "artefact.json").read_text())["step"] == 3


def test_a_phase_ends_with_the_student_as_the_teacher(trained, places):
    out = trained("progressive", "run", *SHORT, "--num-validation-images", "0", "--checkpointing-steps", "1")
    saved = {step: out / "checkpoints" / f"step-{step:06d}" for step in (1, 2)}
    weights = {step: load_file(folder / "weights.safetensors") for step, folder in saved.items()}
    teacher = {step: load_file(folder / "moved.safetensors") for step, folder in saved.items()}
    live = {name.replace("teacher.", "unet."): weight for name, weight in teacher[1].items()}
    assert live.keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in live.items())
    assert all(torch.equal(weight, teacher[1][name]) for name, weight in teacher[2].items())


def held(modules):
    """Megabytes of the weights and buffers of networks."""
    return sum(x.nbytes for module in modules for x in [*module.parameters(), *module.buffers()]) / 1e6


def test_check_counts_teacher_and_target(places, tmp_path, capsys, monkeypatch):
    """A copy of the network for the student, and one for the target, beside that of the base; none for adapters.

    Text encoders and VAE are not there in a step, since what they give is cached.
    """
    # Seconds each, of which weights are no part
    monkeypatch.setattr(memory_estimate, "traced", lambda *step: Counter())
    monkeypatch.setattr(memory_estimate, "of_preview", lambda *preview: 0)
    pixels = [DDPMPipeline.from_pretrained(places.pixels).unet]
    sd = DiffusionPipeline.from_pretrained(places.sd, safety_checker=None)
    flow = DiffusionPipeline.from_pretrained(families.resolve_model("tiny-flow"))
    told = reshaped(sd.unet, time_cond_proj_dim=256)
    cases = {
        "consistency, distilled": (["--target-decay", "0"], [*pixels, *pixels]),
        "consistency, distilled, with a target": (["--target-decay", "0.9"], [*pixels, *pixels, *pixels]),
        "lcm": ([], [sd.unet, told, told]),
        "lcm, adapters": ([], [sd.unet]),
        "reflow": ([], [flow.transformer, flow.transformer]),
    }
    for name, (options, networks) in cases.items():
        row = name.removesuffix(", with a target")
        code, out, err = answer(capsys, "check", *command(row, places, tmp_path / "run", *options))
        assert code == 0, err
        counted = float(re.search(r"([\d.]+) MB  weights, trained and frozen", out)[1])
        adapters = re.search(r"([\d,]+) parameters train", out)[1] if name.endswith("adapters") else "0"
        expected = held(networks) + 4e-6 * int(adapters.replace(",", ""))
        assert counted == pytest.approx(expected, rel=0.025, abs=0.06), name  # rotary tables are no buffers


@pytest.mark.parametrize("name", ["lcm", "guidance-distillation", "reflow", "progressive", "consistency, distilled"])
def test_half_precision_and_gradient_checkpointing(name, trained):
    options = [*SHORT, "--num-validation-images", "0", "--gradient-checkpointing"]
    trained(name, "run", *options, "--mixed-precision", "bf16")


def test_sdxl_is_distilled_by_the_same_recipe(places, tmp_path, capsys):
    base = pipelines.save(pipelines.sdxl, tmp_path / "sdxl")
    own = ["--model", str(base), *SHORT, "--validation-inference-steps", "2", "--num-validation-images", "0"]
    assert status(command("lcm", places, tmp_path / "run", *own)) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator("cpu").manual_seed(0)
    theirs = pipe("a circle", num_inference_steps=2, guidance_scale=11.0, generator=seed).images[0]
    words = [
        "sample",
        "--model",
        str(tmp_path / "run"),
        "--prompt",
        "a circle",
        "--output-dir",
        str(tmp_path / "drawn"),
    ]
    assert status(words) == 0
    assert np.array_equal(np.asarray(theirs), np.asarray(Image.open(tmp_path / "drawn" / "00000.png")))


def test_the_command_lines_of_diffusers_test_run(places, tmp_path):
    """Those of test_lcm_lora.py: two steps; seven, and on to nine, which needs no --resume_from_checkpoint here."""
    base, out = pipelines.save(pipelines.sdxl, tmp_path / "sdxl"), tmp_path / "run"
    words = f"""
        lcm --lora --pretrained_teacher_model {base} --dataset_name {places.pictures} --resolution 64 --lora_rank 4
        --train_batch_size 1 --gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant
        --lr_warmup_steps 0 --num-validation-images 0 --dataloader_num_workers 0
    """.split()
    assert status([*words, "--max_train_steps", "2", "--output_dir", str(tmp_path / "short")]) == 0
    assert all("lora" in name for name in load_file(tmp_path / "short" / "pytorch_lora_weights.safetensors"))
    saving = [*words, "--checkpointing_steps", "2", "--output_dir", str(out)]
    assert status([*saving, "--max_train_steps", "7"]) == 0
    assert status([*saving, "--max_train_steps", "9"]) == 0
    assert json.loads((out / "artefact.json").read_text())["step"] == 9


LCM = """
--pretrained_teacher_model=m --pretrained_vae_model_name_or_path=v --teacher_revision=r --train_shards_path_or_url=d
--interpolation_type=bilinear --random_flip --train_batch_size=16 --num_train_epochs=3 --max_train_samples=4
--adam_weight_decay=0.0 --proportion_empty_prompts=0 --w_min=3.0 --w_max=14.0 --num_ddim_timesteps=25 --loss_type=l2
--huber_c=0.002 --unet_time_cond_proj_dim=128 --vae_encode_batch_size=8 --timestep_scaling_factor=9.0 --ema_decay=0.9
--cast_teacher_unet --use_fix_crop_and_size --encode_batch_size=8 --enable_xformers_memory_efficient_attention
--validation_steps=7 --checkpointing_steps=9 --resume_from_checkpoint=latest --mixed_precision=bf16 --seed=3
"""
LORA = "--lora_rank=8 --lora_alpha=16 --lora_dropout=0.1 --lora_target_modules=to_q --learning_rate=1e-06"
CONSISTENCY = """
--model_config_name_or_path=n --pretrained_model_name_or_path=m --dataset_name=d --dataset_image_column_name=i
--dataset_class_label_column_name=l --resolution=32 --interpolation_type=bilinear --class_conditional --num_classes=10
--class_embed_type=c --optimizer_type=radam --sigma_min=0.001 --sigma_max=70.0 --rho=6.0 --huber_c=0.1
--discretization_s_0=5 --discretization_s_1=640 --constant_discretization_steps --p_mean=-1.0 --p_std=1.5
--noise_precond_type=cm --input_precond_type=cm --skip_steps=1 --cast_teacher --use_ema --ema_min_decay=0.9
--ema_max_decay=0.99 --use_ema_warmup --ema_inv_gamma=0.5 --ema_power=0.6 --eval_batch_size=4 --save_images_epochs=3
--save_model_epochs=3 --hub_private_repo --validation_steps=5 --tracker_project_name=t
"""
TOGETHER = {"huber_c": ["--loss-type", "huber"], "tracker_project_name": ["--report-to", "tensorboard"]}
SCRIPTS = [("lcm", LCM, []), ("lcm", LORA, ["--lora"]), ("consistency", CONSISTENCY, [])]


@pytest.mark.parametrize(("method", "flags", "more"), SCRIPTS, ids=["lcm", "lora", "consistency"])
def test_flags_of_diffusers_scripts_are_honoured_or_answered(method, flags, more, capsys):
    for word in shlex.split(flags):
        name, _, text = word[2:].partition("=")
        data = [] if text == "d" else ["--dataset", "d"]
        code, out, err = answer(capsys, method, "--dry-run", *data, *more, *TOGETHER.get(name, []), word)
        if name in ANSWERS:
            assert (code, err) == (2, f"error: --{name}: no such option; {ANSWERS[name]}\n")
            continue
        assert (code, err) == (0, ""), word
        value = yaml.safe_load(out)[fields.names_of(METHODS[method].load())[name]]
        assert value == ([text] if isinstance(value, list) else yaml_text.from_text(text) if text else True), word


def test_evaluate_compares_numbers_of_steps(places, tmp_path, capsys):
    out = tmp_path / "evaluation"
    words = ["evaluate", str(places.pixels), "--reference", str(places.pictures), "--output-dir", str(out)]
    words += ["--steps", "1", "2", "--num-images", "8", "--neighbours", "2", "--resamples", "2"]
    code, printed, err = answer(capsys, *words)
    assert code == 0, err
    found = json.loads((out / "evaluation.json").read_text())["by_steps"]
    assert [*found] == ["1", "2"]
    alone = json.loads((out / "steps-2" / "evaluation.json").read_text())["figures"]
    assert found["2"] == alone and found["1"] != alone
    assert len(list((out / "steps-1" / "samples").glob("0*.png"))) == 8
    table = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in table] == ["1", "2"]
    assert float(table[1][1]) == pytest.approx(alone["frechet_random_conv"]["value"], rel=1e-3)
    svg = (out / "evaluation.svg").read_text()
    assert svg.count("<polyline") == len(alone) and 'role="img"' in svg
    code, _, err = answer(capsys, "evaluate", str(places.pictures), "--reference", str(places.pictures), "--steps", "2")
    assert code == 2 and "is a folder of images" in err
