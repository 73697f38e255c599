"""Single-file checkpoints of Stable Diffusion 1, 2 and XL: what a file holds, and its parts as diffusers' folders.

A file holds weights under the names of the original code, and neither settings nor a tokenizer. These are the same for
all models of a kind, so they come with sdtune, and a file is read without a network. Each file is converted once, into
the cache; a folder gets its name when it is complete, so that several processes may convert one file.

The merges are those of CLIP's tokenizer (OpenAI, MIT licence): its vocabulary is the 256 byte letters, the same as ends
of words, what each merge makes, and two marks (Radford et al. 2021; ``simple_tokenizer.py`` of openai/CLIP).
"""

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdtune.config.sections import UserError
from sdtune.data import cache_root
from sdtune.models.part_files import BROKEN, reason

ASSETS = Path(__file__).parents[1] / "assets" / "single_file"

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "pad_token_id": 1}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "model_type": "clip_text_model"}

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_1 = UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_2 = UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
UNET_XL = UNET | {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

SETTINGS: dict[str, dict[str, tuple[list[str], dict[str, Any]]]] = {
    "v1": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_1),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 512, "scaling_factor": 0.18215}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | CLIP_L),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "<|endoftext|>"}),
        "scheduler": (
            ["diffusers", "PNDMScheduler"],
            BETAS | {"skip_prk_steps": True, "set_alpha_to_one": False, "prediction_type": "epsilon"},
        ),
    },
    "v2": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_2),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 768, "scaling_factor": 0.18215}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | OPEN_CLIP_H),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "!"}),
        "scheduler": (
            ["diffusers", "DDIMScheduler"],
            BETAS | {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
        ),
    },
    "xl_base": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_XL),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | CLIP_L),
        "text_encoder_2": (["transformers", "CLIPTextModelWithProjection"], TEXT | OPEN_CLIP_G),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "<|endoftext|>"}),
        "tokenizer_2": (["transformers", "CLIPTokenizer"], {"pad_token": "!"}),
        "scheduler": (
            ["diffusers", "EulerDiscreteScheduler"],
            BETAS | {"timestep_spacing": "leading", "prediction_type": "epsilon"},
        ),
    },
}
"""Kind of checkpoint as diffusers names it, to the class and the settings of each part as its makers published them.

That a file of Stable Diffusion 2 predicts the velocity is a guess, since it does not say; ``--prediction-type`` does.
"""
PIPELINES = {"v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"}
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    ("cond_stage_model.", "conditioner."),
)


def model_folder(file: Path) -> str:
    """A checkpoint as the folder of a pipeline; without a VAE where the file has none.

    Raises:
        UserError: the file is no whole checkpoint, or not of a kind that is known here.
    """
    where = f"--model {file}"
    names = shapes_of(file, where)
    if not any(name.startswith(UNET_PREFIX) for name in names):
        if any(name.startswith(("decoder.", VAE_PREFIX)) for name in names):
            raise UserError(f"{where}: a VAE alone, not a base model; give it as --vae")
        raise UserError(
            f"{where}: cannot be read as a single-file checkpoint: it holds no denoiser under {UNET_PREFIX}*"
        )
    kind = kind_of(file, where)
    if not any(name.startswith(TEXT_PREFIXES) for name in names):
        raise UserError(
            f"{where}: holds no text encoder, so it is no whole base; give it as --unet, with a base as --model"
        )
    import diffusers

    def convert(new: Path, config: Path) -> None:
        vae = {} if any(name.startswith(VAE_PREFIX) for name in names) else {"vae": None}
        loader: Any = getattr(diffusers, PIPELINES[kind])
        more: dict[str, Any] = {"safety_checker": None} if kind != "xl_base" else {}
        loader.from_single_file(str(file), config=str(config), local_files_only=True, **vae, **more).save_pretrained(
            new
        )

    return _converted(file, where, kind, convert)


def part_folder(file: Path, option: str, part: str, base: str | None) -> str:
    """A VAE or a UNet of a single file as a folder that ``from_pretrained`` reads.

    Args:
        part: ``vae`` or ``unet``.
        base: the pipeline folder or Hub id whose part it takes the place of, and whose settings it has; ``None`` for
            those of the kind of the file.

    Raises:
        UserError: the file holds no such part, or one of other sizes.
    """
    where = f"{option} {file}"
    names = shapes_of(file, where)
    kinds = {"vae": ("decoder.", VAE_PREFIX), "unet": (UNET_PREFIX, "input_blocks.", "down_blocks.")}
    if not any(name.startswith(kinds[part]) for name in names):
        raise UserError(f"{where}: holds no {part}; its tensors begin with {', '.join(sorted(names)[:2])}")
    import diffusers

    loader: Any = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}[part]

    def convert(new: Path, config: Path) -> None:
        chosen = base or str(config)
        loader.from_single_file(str(file), config=chosen, subfolder=part).save_pretrained(new)

    key = hashlib.sha256(json.dumps([part, base]).encode()).hexdigest()[:8]
    return _converted(file, where, "v1", convert, f"-{part}-{key}")


def shapes_of(file: Path, where: str) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file. Raises: UserError where it is none, or cut short."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a safetensors file, or cut short ({reason(error)})") from None


def kind_of(file: Path, where: str) -> str:
    """The kind of a checkpoint, by the names and shapes of its tensors. Raises: UserError for one not known here."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = shapes_of(file, where)
    channels = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", [0, 4, 0, 0])[1]
    if channels != 4:
        raise UserError(
            f"{where}: its UNet takes {channels} channels, not 4: an inpainting or editing model, not text-to-image"
        )
    try:
        kind: str = infer_diffusers_model_type({name: torch.empty(s, device="meta") for name, s in shapes.items()})
    except KeyError as error:  # some kinds are told apart by a tensor that this file lacks
        raise UserError(f"{where}: a single file of kind unknown: it lacks {error}") from None
    if kind not in SETTINGS:
        raise UserError(
            f"{where}: a single file of kind {kind}; read are those of Stable Diffusion 1, 2 and XL. Give a diffusers "
            "folder or Hub id of that model"
        )
    return kind


def write_settings(folder: Path, kind: str) -> None:
    """The settings and tokenizers of a kind of checkpoint as a pipeline folder without weights."""
    parts = SETTINGS[kind]
    index: dict[str, Any] = {"_class_name": PIPELINES[kind]} | {name: key for name, (key, _) in parts.items()}
    if kind != "xl_base":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, ((_, class_name), settings) in parts.items():
        (folder / name).mkdir()
        if name.startswith("tokenizer"):
            write_tokenizer(folder / name, settings)
            continue
        own = {"architectures": [class_name]} if "text" in name else {"_class_name": class_name}
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(own | settings), encoding="utf-8")


def write_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    """CLIP's tokenizer, as the files that transformers reads."""
    merges = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode()
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["".join(line.split()) for line in merges.splitlines()]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"} | dict(
        settings
    )
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def byte_letters() -> list[str]:
    """A visible letter for each byte, those that have one first (Radford et al. 2019)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) for b in visible] + [chr(256 + k) for k in range(len(hidden))]


def _converted(file: Path, where: str, kind: str, convert: Callable[[Path, Path], None], suffix: str = "") -> str:
    """The folder in the cache that ``convert(new, settings)`` fills once for a file's content.

    Raises:
        UserError: diffusers cannot convert it.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:20]
    folder = cache_root() / "models" / f"{file.stem}-{digest}{suffix}"
    if folder.is_dir():
        return str(folder)
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    settings = new / "settings"
    try:
        settings.mkdir(parents=True)
        write_settings(settings, kind)
        convert(new / "model", settings)
        try:
            (new / "model").rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    except BROKEN as error:
        raise UserError(f"{where}: cannot be read as a single-file checkpoint: {reason(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return str(folder)
