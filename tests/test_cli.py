"""The command line as people meet it: names, mistakes, verbs, and what it loads before it answers."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sdtune
from sdtune import cli
from sdtune.config import fields, shipped, yaml_text
from sdtune.config.commands import METHODS, VERBS, methods, verbs
from sdtune.config.foreign_flags import ANSWERS, COMMON_NAMES
from sdtune.config.sections import RunFailed, UserError
from tests.conftest import status

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "PIL", "huggingface_hub")

DIFFUSERS = shlex.split("""
--pretrained_model_name_or_path=m --revision=r --variant=fp16 --dataset_name=d --dataset_config_name=c
--train_data_dir=d --image_column=i --caption_column=c --validation_prompt=p --num_validation_images=3
--validation_epochs=2 --max_train_samples=9 --output_dir=o --cache_dir=c --seed=7 --resolution=64
--center_crop --random_flip --train_batch_size=3 --num_train_epochs=5 --max_train_steps=6
--gradient_accumulation_steps=2 --gradient_checkpointing --learning_rate=2e-4 --scale_lr --lr_scheduler=cosine
--lr_warmup_steps=3 --snr_gamma=5.0 --use_8bit_adam --allow_tf32 --dataloader_num_workers=1 --adam_beta1=0.8
--adam_beta2=0.99 --adam_weight_decay=1e-3 --adam_epsilon=1e-7 --max_grad_norm=0.5 --push_to_hub --hub_token=t
--prediction_type=v_prediction --hub_model_id=u/m --logging_dir=l --mixed_precision=bf16 --report_to=wandb
--local_rank=0 --checkpointing_steps=50 --checkpoints_total_limit=3 --resume_from_checkpoint=latest
--enable_xformers_memory_efficient_attention --noise_offset=0.05 --rank=8 --image_interpolation_mode=bicubic
""")
"""The 51 flags of diffusers' train_text_to_image_lora.py, with values."""

SCRIPTS = {
    "t2i-adapter": """
    --adapter_model_name_or_path=a --detection_resolution=512 --crops_coords_top_left_h=0 --tokenizer_name=t
    --conditioning_image_column=c --proportion_empty_prompts=0.1 --validation_image=i --tracker_project_name=t
    """,
    "instruct-pix2pix": """
    --original_image_column=o --edited_image_column=e --edit_prompt_column=p --val_image_url=u --val_image_url_or_path=u
    --validation_epochs=1 --conditioning_dropout_prob=0.25 --use_ema --non_ema_revision=r --vae_precision=fp32
    --crops_coords_top_left_h=0 --crops_coords_top_left_w=0 --pretrained_vae_model_name_or_path=v --random_flip
    """,
    "controlnet": """
    --controlnet_model_name_or_path=c --tokenizer_name=t --lr_num_cycles=2 --lr_power=2.0 --set_grads_to_none
    --train_data_dir=d --image_column=i --conditioning_image_column=c --proportion_empty_prompts=0.1
    --validation_image=i --validation_steps=9 --tracker_project_name=t
    --crops_coords_top_left_h=0 --crops_coords_top_left_w=0
    --enable_npu_flash_attention --num_extra_conditioning_channels=1 --upcast_vae --weighting_scheme=logit_normal
    --logit_mean=0.5 --logit_std=2.0 --mode_scale=1.5 --precondition_outputs=1 --max_sequence_length=77
    --dataset_preprocess_batch_size=9 --use_adafactor --num_double_layers=2 --num_single_layers=2 --jsonl_for_train=j
    --guidance_scale=3.0 --save_weight_dtype=fp32 --enable_model_cpu_offload --pretrained_vae_model_name_or_path=v
    --image_interpolation_mode=bicubic
    """,
    "dreambooth": """
    --tokenizer_name=t --instance_data_dir=d --class_data_dir=c --instance_prompt=p --class_prompt=k
    --with_prior_preservation --prior_loss_weight=0.5 --num_class_images=7 --train_text_encoder --sample_batch_size=3
    --lr_num_cycles=2 --lr_power=2.0 --validation_steps=9 --prior_generation_precision=fp16 --set_grads_to_none
    --offset_noise --pre_compute_text_embeddings --tokenizer_max_length=77 --text_encoder_use_attention_mask
    --skip_save_text_encoder --validation_images=i --class_labels_conditioning=timesteps
    --validation_scheduler=DDPMScheduler --lora_dropout=0.1 --rank=8 --image_interpolation_mode=bicubic --snr_gamma=5.0
    --repeats=4 --text_encoder_lr=5e-6 --use_dora --random_flip --image_column=i --caption_column=c --optimizer=prodigy
    --token_abstraction=TOK --num_new_tokens_per_abstraction=2 --train_text_encoder_ti --train_text_encoder_ti_frac=0.5
    --train_text_encoder_frac=0.5 --cache_latents --noise_offset=0.1 --initializer_concept=c
    """,
    "textual-inversion": """
    --save_steps=9 --save_as_full_pipeline --num_vectors=3 --tokenizer_name=t --train_data_dir=d
    --placeholder_token=<y> --initializer_token=i --learnable_property=style --repeats=4 --lr_num_cycles=2
    --validation_steps=9 --validation_epochs=2 --no_safe_serialization --random_flip
    """,
    "text-to-image": """
    --input_perturbation=0.1 --validation_prompts=p --dream_training --dream_detail_preservation=2.0 --use_ema
    --offload_ema --foreach_ema --non_ema_revision=r --validation_epochs=2 --tracker_project_name=t
    --proportion_empty_prompts=0.1 --enable_npu_flash_attention
    """,
}
"""What diffusers' train_dreambooth.py, train_dreambooth_lora.py (and its SD 1.5 "advanced" kin), textual_inversion.py
and train_text_to_image.py take beyond most of the above."""
IN_ALL = {"train_data_dir", "max_train_samples", "caption_column", "rank", "prediction_type", "dataset_name"}
"""Flags of DIFFUSERS that not each of these scripts has; the others are tried on each."""
GOES_WITH = {
    "num_class_images": "--prior-preservation --class-prompt k",
    "prior_loss_weight": "--prior-preservation --class-prompt k",
    "sample_batch_size": "--prior-preservation --class-prompt k",
    "lr_num_cycles": "--lr-scheduler cosine_with_restarts",
    "lr_power": "--lr-scheduler polynomial",
    "lr_warmup_steps": "--lr-scheduler cosine",
    "dream_detail_preservation": "--dream",
    "tracker_project_name": "--report-to tensorboard",
    "class_data_dir": "--prior-preservation",
    "class_prompt": "--prior-preservation",
    "with_prior_preservation": "--class-prompt k",
    "rank": "--lora",
    "lora_dropout": "--lora",
    "use_dora": "--lora",
    "text_encoder_lr": "--train-text-encoder",
    "train_text_encoder_frac": "--train-text-encoder",
    "train_text_encoder_ti_frac": "--lora --placeholder-token <x>",
}

RENAMED = {
    "pretrained_model_name_or_path": "model",
    "dataset_name": "dataset",
    "train_data_dir": "dataset",
    "max_train_steps": "steps",
}

PUBLISHED = """
accelerate launch --mixed_precision="fp16" -m sdtune lora --pretrained_model_name_or_path=$MODEL_NAME
--dataset_name=$DATASET_NAME --dataloader_num_workers=8 --resolution=512 --center_crop --random_flip
--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=15000 --learning_rate=1e-04 --max_grad_norm=1
--lr_scheduler="cosine" --lr_warmup_steps=0 --output_dir=${OUTPUT_DIR} --push_to_hub --hub_model_id=${HUB_MODEL_ID}
--report_to=wandb --checkpointing_steps=500 --validation_prompt="Totoro" --seed=1337
"""
"""The command of diffusers' LoRA guide, its script's name replaced."""


def answer(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    capsys.readouterr()
    return status(list(words)), *capsys.readouterr()


def dry(capsys, *words: str) -> dict:
    """The config that a ``sdtune lora`` command line resolves to."""
    code, out, err = answer(capsys, "lora", "--dry-run", *words)
    assert (code, err) == (0, "")
    return yaml.safe_load(out)


def refused(capsys, *words: str) -> list[str]:
    """The lines with which ``sdtune lora`` refuses a command line."""
    code, out, err = answer(capsys, "lora", "--dry-run", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    return [line.strip() for line in err.removeprefix("error: ").splitlines()]


def flat(text: str) -> str:
    """A message without the box that Typer draws around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# ---- the flags of diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("word", DIFFUSERS, ids=lambda w: w.partition("=")[0][2:])
def test_each_flag_of_the_diffusers_script_is_honoured_or_answered(word, capsys):
    name, _, text = word[2:].partition("=")
    data = [] if name in ("dataset_name", "train_data_dir") else ["--dataset", "d"]
    if name in ANSWERS:
        (line,) = refused(capsys, *data, word)
        assert line == f"--{name}: no such option; {ANSWERS[name]}"
        assert text == "" or not re.search(rf"\b{text}\b", line.partition(";")[0])
        return
    field = RENAMED.get(name, name)
    data += shlex.split(GOES_WITH.get(name, "")) if name == "lr_warmup_steps" else []
    value = dry(capsys, *data, word)[field]
    if not text:
        assert value is True
    elif isinstance(value, list):
        assert value == [text]
    else:
        assert value == (float(text) if isinstance(value, int | float) else text)
    if text:  # argparse's other spelling, and hyphens
        assert dry(capsys, *data, f"--{name.replace('_', '-')}", text)[field] == value


FLAGS = [
    (command, word)
    for command, own in SCRIPTS.items()
    for word in shlex.split(own) + [w for w in DIFFUSERS if w[2:].partition("=")[0] not in IN_ALL]
]


@pytest.mark.parametrize(("command", "word"), FLAGS, ids=[f"{c}-{w[2:].partition('=')[0]}" for c, w in FLAGS])
def test_flags_of_the_other_scripts_are_honoured_or_answered(command, word, capsys):
    name, _, text = word[2:].partition("=")
    config = next(c for c in methods() if c.method == command)
    more = ["--placeholder-token", "p"] if command == "textual-inversion" else []
    more += ["--dataset", "d", *shlex.split(GOES_WITH.get(name, ""))]
    code, out, err = answer(capsys, command, "--dry-run", *more, word)
    if name in ANSWERS:
        assert (code, err) == (2, f"error: --{name}: no such option; {ANSWERS[name]}\n")
        return
    assert (code, err) == (0, "")
    value = yaml.safe_load(out)[fields.names_of(config)[name]]
    assert value == ([text] if isinstance(value, list) else yaml_text.from_text(text) if text else True)


def test_all_51_flags_are_here():
    assert len({w.partition("=")[0] for w in DIFFUSERS}) == len(DIFFUSERS) == 51


def test_the_flags_that_sdtune_does_without_are_answered_together(capsys):
    without = [w for w in DIFFUSERS if w[2:].partition("=")[0] in ANSWERS]
    lines = refused(capsys, "--dataset", "d", *without)
    assert [line.partition(":")[0] for line in lines] == [w.partition("=")[0] for w in without]
    assert not any("lists them" in line or "did you mean" in line for line in lines)


def test_advice_names_flags_that_exist():
    spelt = {fields.flag(n) for config in methods() for n in config.model_fields} | {"--overwrite", "--config"}
    for name, told in ANSWERS.items():
        assert not any(name in fields.names_of(config) for config in methods())
        assert set(re.findall(r"--[a-z0-9-]+", told)) <= spelt, name


COMMON = {
    "--lr": "--learning-rate",
    "--bs": "--train-batch-size",
    "--batch-size": "--train-batch-size",
    "--epochs": "--num-train-epochs",
    "--output": "--output-dir",
    "--out": "--output-dir",
    "--data": "--dataset",
    "--model-path": "--model",
    "--num-gpus": "--num-processes",
    "--dim": "--rank",
    "--ddpm_num_inference_steps": "--validation-inference-steps",
}


def test_names_that_people_know_lead_to_the_option(capsys):
    for given, meant in COMMON.items():
        assert refused(capsys, "--dataset=d", given, "1") == [f"{given}: no such option; did you mean {meant}?"]
    for given, answer_ in (("--network-dim", "--rank"), ("--fp16", "--mixed-precision fp16"), ("--bf16", "bf16")):
        (line,) = refused(capsys, "--dataset=d", given)
        assert f"use {answer_}" in line or line.endswith(answer_)


def test_no_advice_changes_the_model_where_the_option_asked_for_does_not(capsys):
    """Names that share most of their letters with an option that means something else."""
    misleading = {
        "--local_rank": "--rank",
        "--overwrite_output_dir": "--output-dir",
        "--eval_batch_size": "train-batch",
    }
    for given, wrong in misleading.items():
        (line,) = refused(capsys, "--dataset=d", given, "-1")
        assert wrong not in line, line
    code, _, err = answer(capsys, "ddpm", "--dataset", "d", "--ddpm_num_inference_steps", "2", "--dry-run")
    assert code == 2
    assert "--ddpm-num-steps" not in err
    assert ANSWERS.keys().isdisjoint(COMMON_NAMES)


def test_a_field_declared_again_keeps_its_other_names(capsys):
    code, out, err = answer(capsys, "dreambooth", "--dataset_name=d", "--instance_prompt=p", "--dry-run")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["dataset"] == "d"


KOHYA = shlex.split("""
--bucket_reso_steps --cache_latents_to_disk --caption_dropout_rate --caption_extension --conv_alpha --conv_dim
--enable_bucket --full_bf16 --ip_noise_gamma --keep_tokens --lowram --max_bucket_reso --max_data_loader_n_workers
--max_token_length --max_train_epochs --mem_eff_attn --min_bucket_reso --multires_noise_iterations --network_alpha
--network_args --network_dim --network_dropout --network_module --network_train_unet_only --network_weights
--no_half_vae --optimizer_type --output_name --reg_data_dir --sample_every_n_steps --sample_prompts --save_every_n_steps
--save_model_as --save_precision --save_state --scale_v_pred_loss_like_noise_pred --sdpa --shuffle_caption --v2
--v_parameterization --weighted_captions --xformers --zero_terminal_snr --base_weights --caption_prefix --color_aug
--caption_tag_dropout_rate --config_file --dataset_config --debiased_estimation_loss --dim_from_weights --fp8_base
--face_crop_aug_range --in_json --initial_epoch --max_timestep --metadata_title --min_timestep --multires_noise_discount
--scale_weight_norms --secondary_separator --stop_text_encoder_training --token_warmup_min --training_comment
--wandb_api_key
--async_upload --base_weights_multiplier --caption_dropout_every_n_epochs --console_log_file --console_log_level
--dataset_class --dataset_repeats --ddp_gradient_as_bucket_view --ddp_static_graph --debug_dataset --deepspeed
--diffusers_xformers --dynamo_backend --fp8_base_unet --fused_backward_pass --highvram --huber_scale
--huggingface_path_in_repo --huggingface_repo_id --huggingface_repo_type --huggingface_repo_visibility
--huggingface_token --initial_step --ip_noise_gamma_random_strength --log_config --log_tracker_config --lr_decay_steps
--lr_scheduler_args --lr_scheduler_min_lr_ratio --lr_scheduler_timescale --lr_scheduler_type
--noise_offset_random_strength --output_config --random_crop --resume --resume_from_huggingface --sample_at_first
--save_last_n_epochs --save_last_n_epochs_state --save_last_n_steps --save_last_n_steps_state --save_n_epoch_ratio
--save_state_on_train_end --save_state_to_huggingface --skip_cache_check --skip_until_initial_step
--tokenizer_cache_dir --torch_compile --use_lion_optimizer --v_pred_like_loss --wandb_run_name --zero_stage
""")
"""Flags of kohya's train_network.py that sdtune has under another name, or not at all."""


def test_the_flags_of_kohyas_scripts_are_answered(capsys):
    lines = refused(capsys, "--dataset=d", *KOHYA)
    assert [line.partition(":")[0] for line in lines] == KOHYA
    assert not any("lists them" in line or "did you mean" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Euler a", "euler-ancestral"),
        ("DPM++ 2M Karras", "dpm++-karras"),
        ("DDIM", "ddim"),
        ("euler", "euler"),
        ("k_euler_a", "euler-ancestral"),
        ("dpmpp_2m", "dpm++"),
        ("uni_pc", "unipc"),
    ],
)
def test_samplers_are_known_by_the_names_of_interfaces(given, meant, capsys):
    code, out, err = answer(capsys, "sample", "--prompt", "x", "--scheduler", given, "--dry-run")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["scheduler"] == meant


def test_a_token_is_never_printed_back(capsys):
    for words in (["--hub_token=hf_secret"], ["--hub-token", "hf_secret"]):
        (line,) = refused(capsys, "--dataset", "d", *words)
        assert "HF_TOKEN" in line
        assert "secret" not in line


def test_the_published_command_of_diffusers_resolves_as_it_stands(capsys, monkeypatch):
    given = {"MODEL_NAME": "some/model", "DATASET_NAME": "lambdalabs/naruto", "OUTPUT_DIR": "o", "HUB_MODEL_ID": "u/m"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    words = shlex.split(os.path.expandvars(PUBLISHED))
    cfg = dry(capsys, *words[words.index("lora") + 1 :])
    expected = {
        "model": "some/model",
        "dataset": "lambdalabs/naruto",
        "dataloader_num_workers": 8,
        "resolution": 512,
        "center_crop": True,
        "random_flip": True,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "steps": 15000,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "output_dir": "o",
        "push_to_hub": True,
        "hub_model_id": "u/m",
        "report_to": ["wandb"],
        "checkpointing_steps": 500,
        "validation_prompt": ["Totoro"],
        "seed": 1337,
    }
    assert expected.items() <= cfg.items()


# ---- spelling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--validation-prompt", "a star", "b"],
        ["--validation_prompts", "a star", "b"],
        ["--validation_prompt=a star", "--validation-prompt", "b"],
        ["--validation-prompt", "a star", "b", "--rank", "4"],
    ],
)
def test_lists_are_spelt_at_length_or_repeated(words, capsys):
    assert dry(capsys, "--dataset", "d", *words)["validation_prompt"] == ["a star", "b"]


def test_aliases(capsys):
    words = ["--train_data_dir=d", "--lora-alpha=2", "--lora_dropout", "0.1", "--hub-private-repo", "--init_lora", "f"]
    cfg = dry(capsys, *words, "--pretrained-vae-model-name-or-path=v", "--lora_target_modules", "to_q", "to_k")
    expected = {"dataset": "d", "alpha": 2.0, "dropout": 0.1, "hub_private": True, "init_adapter": "f", "vae": "v"}
    assert (expected | {"target_modules": ["to_q", "to_k"]}).items() <= cfg.items()


def test_switches(capsys):
    assert dry(capsys, "--dataset=d", "--no_center_crop", "--no-cache")["center_crop"] is False
    assert dry(capsys, "--dataset=d", "--no-center-crop", "--center_crop")["center_crop"] is True


def test_the_last_of_two_flags_wins(capsys):
    assert dry(capsys, "--dataset=d", "--rank=1", "--rank", "2")["rank"] == 2


@pytest.mark.parametrize("config", [*methods(), *verbs()], ids=lambda c: c.method)
def test_help_lists_each_field_once(config, capsys, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 250)
    code, out, _ = answer(capsys, config.method, "--help")
    assert code == 0
    out = out.replace("--[no-]", "--")  # a switch and its opposite share a line
    listed = re.findall(r"^│ +(?:\* +)?(--[a-z0-9-]+)", out, re.MULTILINE)
    assert len(listed) == len(set(listed))
    flags = {fields.written(config, n) for n in config.model_fields}
    assert {flag for flag in flags if flag.startswith("--")} <= set(listed)
    assert all(flag in out for flag in flags)
    shown = " ".join(re.sub("[│]", " ", out).split())
    for name in config.model_fields:
        assert re.sub(r"[*`]", "", fields.description(config, name))[:20] in re.sub(r"[*`]", "", shown)


@pytest.mark.parametrize("config", [*methods(), *verbs()], ids=lambda c: c.method)
def test_no_flag_has_two_meanings(config):
    command = cli.group.commands[config.method]
    flags = [flag for p in command.built.parser().params for flag in (*p.opts, *p.secondary_opts)]
    assert len(flags) == len(set(flags))
    assert all(p.help for p in command.built.parser().params)


@pytest.mark.parametrize("name", METHODS | VERBS)
def test_help_says_of_a_command_what_its_config_does_and_starts_with_lines_that_work(name, capsys):
    config = (METHODS | VERBS)[name].load()
    assert (METHODS | VERBS)[name].summary == config.__doc__
    lines = config.examples.replace("\\\n", "").strip().splitlines()
    assert len(lines) >= (3 if name in METHODS else 2)
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "sdtune"
        code, _, err = answer(capsys, *words, "--dry-run")
        assert (code, err) == (0, ""), line


def test_help_shows_no_type_beside_a_switch(capsys):
    for words in (["--help"], ["lora", "--help"], ["check", "--help"], ["convert", "--help"], ["ls", "--help"]):
        code, out, _ = answer(capsys, *words)
        assert code == 0
        assert re.findall(r"<(?:bool|str|int)[^>]*>", out) == []


# ---- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "--ragk 4": "--ragk: no such option; did you mean --rank?",
        "--resolutoin=4": "--resolutoin: no such option; did you mean --resolution?",
        "--overwrit": "--overwrit: no such option; did you mean --overwrite?",
        "--learning_rte=1": "--learning_rte: no such option; did you mean --learning-rate?",
        "--qqqqq": "--qqqqq: no such option; --help lists them",
        "-r": "-r: no such option; did you mean --rank?",
        "stray": "stray: unexpected argument; options start with --",
        "--push-to-hub true": "true: unexpected argument; options start with --",
        "--rank 4.5": "--rank: wants a whole number, not '4.5'",
        "--rank=": "--rank: wants a whole number, not ''",
        "--max_train_steps 0": "--steps: should be greater than or equal to 1, not 0",
        "--learning-rate nan": "--learning-rate: wants a number, not 'nan'",
        "--learning-rate inf": "--learning-rate: wants a number, not 'inf'",
        "--noise-offset=-inf": "--noise-offset: wants a number, not '-inf'",
        "--learning-rate fast": "--learning-rate: wants a number, not 'fast'",
        "--learning-rate 0": "--learning-rate: should be greater than 0, not 0",
        "--caption-dropout 1.5": "--caption-dropout: should be less than or equal to 1, not 1.5",
        "--ema-decay 1": "--ema-decay: should be less than 1, not 1",
        "--resolution 7": "--resolution: should be greater than or equal to 8, not 7",
        "--checkpoints-total-limit 1": "--checkpoints-total-limit: should be greater than or equal to 2, not 1",
        "--lr-scheduler cosin": "did you mean cosine?",
        "--mixed-precision fp32": "--mixed-precision: 'fp32' is none of no, fp16, bf16, fp8",
        "--optimizer-args '{a: 1'": "--optimizer-args: wants a mapping such as '{d_coef: 2}', not '{a: 1'",
        "--optimizer-args 3": "--optimizer-args: wants a mapping such as '{d_coef: 2}', not 3",
        "--optimizer-args '{a: !!int x}'": "--optimizer-args: wants a mapping such as '{d_coef: 2}'",
        f"--optimizer-args '{'[' * 3000}'": "--optimizer-args: wants a mapping such as '{d_coef: 2}'",
        "--steps 3 --num-train-epochs 2": "steps and num_train_epochs both say how long to train: give one",
        "--rescale-betas-zero-snr --prediction-type epsilon": "use prediction_type v_prediction",
        "--timestep-bias-strategy range --timestep-bias-begin 9 --timestep-bias-end 9": "must be smaller",
        "--output-dir --push-to-hub": "--output-dir: wants a value before --push-to-hub; if that is the value, "
        "--output-dir=--push-to-hub",
        "--config nope.yaml": "--config nope.yaml: no such file or recipe; `sdtune ls` lists them",
    }.items(),
)
def test_a_mistake_is_one_line_under_the_name_of_its_flag(words, told, capsys):
    (line,) = refused(capsys, "--dataset", "d", *shlex.split(words))
    assert told in line


@pytest.mark.parametrize("words", [["--config", "x" * 400], ["--accelerate-config", "x" * 400]])
def test_a_file_name_that_is_too_long_is_one_line(words, capsys):
    code, _, err = answer(capsys, "lora", "--dataset", "d", "--dry-run", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: {'x' * 60}...: the file name is too long")


@pytest.mark.processes
def test_an_argument_that_is_not_utf_8_is_one_line():
    words = [sys.executable, "-m", "sdtune", "lora", "--dataset", b"caf\xe9"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: caf\\udce9: not UTF-8 text\n")


def test_every_mistake_at_once(capsys, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("seeed: 1\nresolution: big\n")
    words = ["--config", str(file), "--ragk=4", "--learning_rate", "fast", "--lr-scheduler=cosin", "stray", "--steps=0"]
    lines = refused(capsys, *words)
    starts = ["stray:", "--ragk:", f"{file}:1: unknown key seeed", f"{file}:2: resolution:", "--learning-rate:"]
    starts += ["--lr-scheduler:", "--steps:", "--dataset: is required"]
    assert sorted(starts) == sorted(s for s in starts for line in lines if line.startswith(s))
    assert len(lines) == len(starts)


def test_nothing_is_written_by_a_mistake_or_a_dry_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, "--ragk=4")
    dry(capsys, "--dataset", "d")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "lroa --rank 4": "No such command 'lroa'. Did you mean 'lora'?",
        "--version-of-what": "No such option: --version-of-what",
        "lora --dataset": "requires an argument",
        "lora --dataset d --num-processes 0": "greater than or equal to 1",
        "lora --dataset d --num-processes two": "--num-processes",
        "lora --dataset d --overwrite=yes": "does not take a value",
        "lora --dataset d --accelerate-config fspd2": "did you mean fsdp2?",
        "lora --dataset d --dry-run --accelerate-config fspd2": "did you mean fsdp2?",
        "cp": "Missing argument",
        "ls extra": "unexpected extra argument",
        "run": "Missing argument",
        "run nope.py": "error: nope.py: not a Python file with a Recipe",
        "cp nope": "nope: no such file or recipe",
        "sample": "error: nothing to show: give prompt or prompt_file",
        "sample --prompt x --num-processes 2": "--num-processes: no such option",
        "compare a b --outptu x.html": "--outptu: no such option; did you mean --output?",
        "watch --opn": "--opn: no such option; did you mean --open?",
        "sample --prompt x --guidance 3": "did you mean --guidance-scale?",
    }.items(),
)
def test_other_mistakes_end_with_code_2(words, told, capsys):
    code, _, err = answer(capsys, *words.split())
    assert code == 2
    assert told in flat(err)


def test_advice_is_never_the_word_itself(capsys):
    _, _, err = answer(capsys, "sample", "--prompt", "x", "--num-processes", "2", "--overwrite")
    for given, meant in re.findall(r"(--[a-z-]+): no such option; did you mean (--[a-z-]+)\?", err):
        assert given != meant


# ---- exit codes of what a command does -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("--rank: too much"), 2, "error: --rank: too much\n"),
        (
            UserError("Traceback ...\nsdtune.config.sections.UserError: a.png: is truncated\n"),
            2,
            "error: a.png: is truncated\n",
        ),
        (RunFailed("step 3: no finite gradient"), 1, "failed: step 3: no finite gradient\n"),
        (SystemExit(143), 143, ""),
    ],
)
def test_the_exit_code_is_the_works_own(raised, code, told, capsys, monkeypatch):
    def work(*_):
        raise raised

    monkeypatch.setattr(shipped, "recipes", work)
    assert answer(capsys, "ls") == (code, "", told)


# ---- verbs ---------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """Ready-made recipes of the test's own."""
    file = tmp_path / "shipped" / "lora" / "sd15-naruto.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# SD 1.5 on 1,200 pictures\nrank: 13\ndataset: d\n")
    monkeypatch.setattr(shipped, "recipes", lambda: {"lora/sd15-naruto": file})
    return file


def test_ls_lists_recipes_with_their_first_line_and_what_is_for_launching_apart(recipes, capsys):
    code, out, _ = answer(capsys, "ls")
    title, *lines = out.splitlines()
    assert (code, title) == (0, "Recipes, for --config:")
    assert lines[0].split(maxsplit=1) == ["lora/sd15-naruto", "SD 1.5 on 1,200 pictures"]
    first = lines.index("Launching, for --accelerate-config:")
    second = next(i for i, line in enumerate(lines) if "sbatch" in line and not line.startswith(" "))
    named = [line.split()[0] for line in lines[first + 1 : second]]
    assert named == list(shipped.ready_made("accelerate"))
    assert [line.split()[0] for line in lines[second + 1 :]] == list(shipped.ready_made("slurm"))


@pytest.mark.parametrize("name", shipped.ready_made(*shipped.PLACES))
def test_cp_copies_what_is_for_launching(name, tmp_path, capsys):
    code, out, _ = answer(capsys, "cp", name, str(tmp_path))
    (copy,) = tmp_path.iterdir()
    assert (code, copy.read_bytes()) == (0, shipped.ready_made()[name].read_bytes())
    assert {"accelerate": f"sdtune lora --accelerate-config {copy}", "slurm": f"sbatch {copy} lora"}[
        name.partition("/")[0]
    ] in out


def test_cp_copies_a_recipe_once(recipes, tmp_path, capsys):
    code, out, _ = answer(capsys, "cp", "lora/sd15-naruto", str(tmp_path))
    copy = tmp_path / "sd15-naruto.yaml"
    assert (code, copy.read_bytes()) == (0, recipes.read_bytes())
    assert f"sdtune lora --config {copy}" in out
    assert dry(capsys, "--config", str(copy))["rank"] == 13
    copy.write_text("rank: 1")
    code, _, err = answer(capsys, "cp", "lora/sd15-naruto", str(tmp_path))
    assert (code, copy.read_text()) == (2, "rank: 1")
    assert "exists; name another file" in err
    assert answer(capsys, "cp", "lora/sd15-narut", str(tmp_path))[0] == 2


def test_env_prints_versions(capsys):
    code, out, _ = answer(capsys, "env")
    assert code == 0
    assert {"sdtune", "python", "torch", "diffusers", "cpu", "gpu"} <= {
        line.partition(":")[0] for line in out.splitlines()
    }


OWN = '''
from sdtune.config.methods.lora import LoraConfig
from sdtune.recipes.lora import Lora

class MineConfig(LoraConfig):
    """Mine."""
    method = "mine"
    strength: float = 0.5
    """How much."""

class Mine(Lora):
    """My own method."""
    Config = MineConfig
'''


def test_run_takes_the_flags_of_a_recipe_of_ones_own(tmp_path, capsys):
    file = tmp_path / "mine_alone.py"
    file.write_text(OWN)
    words = ["run", str(file), "--dataset_name", "d", "--strength", "0.7", "--validation-prompt", "a", "b"]
    code, out, err = answer(capsys, *words, "--dry-run")
    assert (code, err) == (0, "")
    assert {"strength": 0.7, "dataset": "d", "validation_prompt": ["a", "b"]}.items() <= yaml.safe_load(out).items()
    code, _, err = answer(capsys, "run", str(file), "--dataset", "d", "--strenth", "0.7", "--dry-run")
    assert (code, err) == (2, "error: --strenth: no such option; did you mean --strength?\n")
    code, out, _ = answer(capsys, "run", str(file), "--help")
    assert code == 0
    assert "--strength" in out
    assert "My own method." in out


def test_run_wants_exactly_one_recipe(tmp_path, capsys):
    for text, found in (("", 0), (OWN + OWN.replace("Mine", "Yours"), 2)):
        file = tmp_path / f"own_{found}.py"
        file.write_text(text)
        code, _, err = answer(capsys, "run", str(file))
        assert (code, err) == (2, f"error: {file}: wants exactly one class that derives from Recipe, found {found}\n")
    (tmp_path / "own.txt").write_text(OWN)
    assert answer(capsys, "run", str(tmp_path / "own.txt"))[0] == 2


# ---- what it loads -------------------------------------------------------------------------------------

QUICK = {
    "--help": 0,
    "lora --help": 0,
    "sample -h": 0,
    "run --help": 0,
    "cp --help": 0,
    "env --help": 0,
    "lora --ragk 4": 2,
    "lora --dataset d --rank x": 2,
    "lora --dataset d --dry-run": 0,
    "sample --prompt x --dry-run": 0,
    "lroa": 2,
    "ls": 0,
    "run nope.py": 2,
}


ANSWERS_OF_FORKS = """
import json, os, sys
from sdtune.cli import main
for words in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            main(words.split())
        except SystemExit as ended:
            print("ended", json.dumps([words, ended.code or 0, list(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.processes
def test_answers_come_before_anything_heavy_is_imported():
    """In a Python that has imported the command line alone, a fork of it for each answer."""
    line = [sys.executable, "-c", ANSWERS_OF_FORKS, *QUICK]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    ended = [json.loads(line.removeprefix("ended ")) for line in done.stdout.splitlines() if line.startswith("ended ")]
    assert {words: code for words, code, _ in ended} == QUICK
    assert all("sdtune.cli" in loaded for _, _, loaded in ended)
    assert {words: found for words, _, loaded in ended if (found := [name for name in HEAVY if name in loaded])} == {}


@pytest.mark.processes
def test_the_module_and_the_installed_command_answer_alike():
    words = ["lora", "--ragk", "4"]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "sdtune", *words], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert said == ["error: --ragk: no such option; did you mean --rank?", "       --dataset: is required"]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sdtune.config.parsing" in loaded
    assert loaded.isdisjoint(HEAVY)
    entry = Path(sys.executable).with_name("sdtune")
    if entry.exists():
        done = subprocess.run([entry, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()) == (2, said)


@pytest.mark.processes
def test_no_words_show_the_help():
    done = subprocess.run([sys.executable, "-m", "sdtune"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(f" {verb} " in done.stdout + done.stderr for verb in ("lora", "sample", "run", "ls", "cp", "env"))


def test_version(capsys):
    code, out, _ = answer(capsys, "--version")
    assert (code, out) == (0, f"sdtune {sdtune.__version__}\n")
