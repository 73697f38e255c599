"""From names to a pipeline: the base model, and adapters on it with their weights."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models import families, formats
from sdtune.models.attach import Layers, attach
from sdtune.models.clip_skip import of_layers
from sdtune.models.controls import check_controls, read_controls
from sdtune.models.cross_attention import load_cross_attention
from sdtune.models.formats import Embedding, embedding
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.part_files import (
    BROKEN,
    check_channels,
    check_scheduler,
    check_tokenizer,
    has_part,
    read_part,
    read_scheduler,
    reason,
    refuse_broken,
)
from sdtune.models.pixel_models import read_classes
from sdtune.models.pixel_networks import sides_of
from sdtune.run.device import best_device
from sdtune.run.precision import DTYPES
from sdtune.run.sampling_file import SAMPLING, Sampling
from sdtune.run.usage import CLASSES, word_files


def load_pipeline(cfg: SampleConfig) -> DiffusionPipeline:
    """The base of ``cfg`` on the best device here, without safety checker and progress bars.

    Raises `UserError` for a pickle, a missing folder and a folder that holds no pipeline.
    """
    families.silence_libraries()
    dtype = DTYPES[cfg.mixed_precision]
    device = best_device()
    if cfg.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed-precision fp16: needs a GPU; bf16 works on a CPU")
    source, where = families.resolve_model(cfg.model), f"--model {cfg.model}"
    index = families.model_index(source, cfg)
    hub = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}
    parts = replaced_parts(cfg, source, index, dtype)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if "vae" in index and not has_part(index, "vae") and not cfg.vae:
        raise UserError(f"{where}: holds no VAE; give one with --vae")
    if Path(source).is_dir():
        parts |= own_parts(cfg, source, {name: kind for name, kind in index.items() if name not in parts}, dtype)
    # a pipeline asks for parts that its index calls absent, unless it is given None in words
    parts = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None} | parts
    if has_part(index, "scheduler"):
        try:
            schedule = DDPMScheduler.load_config(source, subfolder="scheduler", **hub)
        except BROKEN as error:
            raise UserError(f"{where}: scheduler: {reason(error)}") from None
        check_scheduler(schedule, f"{where}: scheduler")
    kind = DiffusionPipeline
    if cfg.control:
        networks = [split_weight(text, "--control")[0] for text in cfg.control]
        kind, controls = read_controls(networks, index.get("_class_name", ""), dtype, cfg.cache_dir)
        parts |= controls
    try:
        pipe = kind.from_pretrained(source, dtype=dtype, variant=cfg.variant, **hub, **parts)
    except BROKEN as error:
        raise UserError(f"{where}: {reason(error)}") from error
    check_pipeline(pipe, cfg)
    if cfg.control:
        check_controls(pipe, cfg.control, cfg.model)
    return pipe.to(device)


def replaced_parts(cfg: SampleConfig, source: str, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The parts that ``--vae`` and ``--unet`` put in the place of the base's."""
    kinds = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}
    found = {}
    if cfg.unet and not has_part(index, "unet"):
        raise UserError(f"--unet {cfg.unet}: {cfg.model} has no UNet; leave it out")
    for part, name in {"vae": cfg.vae, "unet": str(cfg.unet) if cfg.unet else None}.items():
        if name:
            base = source if has_part(index, part) else None
            folder, subfolder = families.part_location(name, f"--{part}", part, base)
            where = {"subfolder": subfolder} if subfolder else {}
            found[part] = read_part(
                kinds[part], folder, f"--{part} {name}", dtype=dtype, cache_dir=cfg.cache_dir, **where
            )
    if "unet" in found:
        hub = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}
        own = kinds["unet"].load_config(source, subfolder="unet", **hub)["cross_attention_dim"]
        if found["unet"].config["cross_attention_dim"] != own:
            raise UserError(f"--unet {cfg.unet}: made for another text encoder than that of {cfg.model}")
    return found


def own_parts(cfg: SampleConfig, source: str, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules of a pipeline folder, read one by one, since a pipeline reads incomplete ones without a word."""
    found = {}
    for name in index:
        if not has_part(index, name):
            continue
        library, class_name = index[name]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(class_name), None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        variant = cfg.variant if any(Path(source, name).glob(f"*.{cfg.variant}*")) else None
        found[name] = read_part(
            kind, source, f"--model {cfg.model}: {name}", subfolder=name, dtype=dtype, variant=variant
        )
    return found


def check_pipeline(pipe: DiffusionPipeline, cfg: SampleConfig) -> None:
    """Refuse a pipeline whose parts are damaged or do not belong together. Raises: UserError."""
    where = f"--model {cfg.model}"
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            refuse_broken(part, f"{where}: {name}")
    text_encoder, unet = pipe.components.get("text_encoder"), pipe.components.get("unet")
    if isinstance(text_encoder, transformers.CLIPTextModel):
        check_tokenizer(pipe.tokenizer, text_encoder.config, where)
    if unet is not None and pipe.components.get("vae") is not None:
        check_channels(unet.config, pipe.vae.config, where, type(pipe).__name__)


def load_adapters(
    pipe: DiffusionPipeline, adapters: Sequence[str], clip_skip: int | None = None
) -> list[RemovableHandle]:
    """Load each ``PATH_OR_ID[=WEIGHT]``, of any known format, into ``pipe`` with its weight, and the words it brings.

    With ``clip_skip`` the text encoder has fewer layers than the adapters may have been made for.

    Returns the hooks that add what PEFT cannot; removing them takes those changes back.

    Raises:
        UserError: a file that cannot be read, or that does not match the base in every module and word.
    """
    if load_cross_attention(pipe, list(map(split_weight, adapters))):
        return []
    layers, names, weights, hooks = Layers(pipe.components), [], [], []
    for k, text in enumerate(adapters):
        where, weight = split_weight(text)
        asked = f"--adapter {where}"
        adapter = formats.read(where, "--adapter")
        if clip_skip:
            adapter = of_layers(adapter, len(pipe.text_encoder.encoder.layers))
        for word in adapter.words:
            add_word(pipe, word, asked)
        own, added = attach(layers, f"adapter_{k}", adapter, weight, asked)
        names += own
        weights += [weight] * len(own)
        hooks += added
    if names:
        pipe.set_adapters(names, weights)
    return hooks


def read_sampling(cfg: SampleConfig, model: str) -> Sampling | None:
    """How a distilled model or adapter wants to be sampled; ``None`` for every other.

    Args:
        model: an adapter with or without its weight, or a model: file, folder, Hub id, or `tiny`.

    Raises:
        UserError: its ``sampling.json`` is damaged.
    """
    where, _ = split_weight(model)
    place = Path(where).expanduser()
    if place.exists() or where.count("/") != 1 or where[0] in "./~":
        return Sampling.read((place if place.is_dir() else place.parent) / SAMPLING)
    revision = cfg.revision if where == cfg.model else None
    try:
        return Sampling.read(Path(hf_hub_download(where, SAMPLING, revision=revision, cache_dir=cfg.cache_dir)))
    except (OSError, ValueError):  # no such file, or no Hub: what reads the weights says so
        return None


def split_weight(text: str, option: str = "--adapter") -> tuple[str, float]:
    """``runs/lora=0.8`` is (``runs/lora``, 0.8); without a number the weight is 1. Paths may hold a ``=``."""
    where, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"{option} {text}: {number} is no weight")
    return where, weight


def load_embeddings(pipe: DiffusionPipeline, embeddings: Sequence[str], adapters: Sequence[str] = ()) -> list[str]:
    """Teach ``pipe`` the words of textual-inversion files, and of those in the folder of an adapter (pivotal tuning).

    Returns the words.

    Raises:
        UserError: a file without a word, a word that is known already, or vectors of another width than the base's.
    """
    folders = [Path(where) for where, _ in map(split_weight, adapters) if Path(where).is_dir()]
    with_adapter = [str(f / name) for f in folders for name in word_files(p.name for p in f.glob("*.safetensors"))]
    words: dict[str, str] = {}
    for where in dict.fromkeys([*with_adapter, *embeddings]):
        asked = f"--embedding {where}"
        word = embedding.read(where, option="--embedding")
        if word is None:
            raise UserError(f"{asked}: holds no learned word; if it is an adapter, give --adapter {where}")
        if other := words.get(word.token):
            raise UserError(
                f"{asked}: its word is {word.token}, as that of {other}; sdtune convert gives one another: --token"
            )
        add_word(pipe, word, asked)
        words[word.token] = where
    return list(words)


def add_word(pipe: DiffusionPipeline, word: Embedding, asked: str) -> None:
    """Teach the text encoders of ``pipe`` a word; ``UserError`` that begins with ``asked``."""
    encoders = {
        name for name in pipe.components if name.startswith("text_encoder") and pipe.components[name] is not None
    }
    if missing := sorted(encoders ^ word.parts.keys()):
        what = "has no vectors for" if missing[0] in encoders else "has vectors for a second text encoder, which is not"
        raise UserError(f"{asked}: {what} {missing[0]} of this base")
    for part, table in word.parts.items():
        encoder, tokenizer = pipe.components[part], pipe.components[part.replace("text_encoder", "tokenizer")]
        width = encoder.get_input_embeddings().weight.shape[1]
        if table.shape[1] != width:
            raise UserError(
                f"{asked}: its vectors are {table.shape[1]} wide, and those of the base's {part} {width} "
                "(768 is Stable Diffusion 1, 1024 is 2): it was made for another base"
            )
        if word.token in tokenizer.get_vocab():
            raise UserError(
                f"{asked}: the base knows the word {word.token} already; sdtune convert gives the file another: --token"
            )
        try:
            pipe.load_textual_inversion(
                table.to(encoder.dtype), token=word.token, tokenizer=tokenizer, text_encoder=encoder
            )
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"{asked}: does not fit this base: {str(error).strip().splitlines()[0]}") from error


def class_labels(names: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """The labels of ``names``: int64 ``[N]``; `UserError` for one that ``where`` does not know."""
    for name in names:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, n=1)
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise UserError(f"--class {name}: {where} knows {known}" + (f"; did you mean {close[0]}?" if close else ""))
    return torch.tensor([classes.index(name) for name in names])


def load_classifier(folder: Path, unet: UNet2DModel, scheduler: SchedulerMixin) -> tuple[nn.Module, list[str]]:
    """A run of ``sdtune classifier`` and its classes; `UserError` where it cannot steer this model."""
    where = f"--classifier {folder}"
    classifier = read_part(NoisyClassifier, str(folder), f"{where}: not a classifier of noised images")
    own = read_scheduler(
        DDPMScheduler, str(folder), f"{where}: not a classifier of noised images", subfolder="scheduler"
    )
    classes = read_classes(str(folder), where)
    if classes is None:
        raise UserError(f"{where}: not a classifier of noised images: no {CLASSES} in it")
    sizes = [sides_of(network.config["sample_size"]) for network in (classifier, unet)]
    if sizes[0] != sizes[1]:
        named = [f"{width} x {height}" if width != height else f"{width} pixels a side" for height, width in sizes]
        raise UserError(f"{where}: made for {named[0]}, the model for {named[1]}")
    if classifier.config["in_channels"] != unet.config["in_channels"]:
        channels = classifier.config["in_channels"], unet.config["in_channels"]
        raise UserError(f"{where}: made for {channels[0]} channels, the model for {channels[1]}")
    for name in ("num_train_timesteps", "beta_schedule"):
        if own.config[name] != scheduler.config.get(name):
            raise UserError(f"{where}: its {name} is {own.config[name]}, the model's {scheduler.config.get(name)}")
    if not torch.allclose(own.betas, scheduler.betas.cpu(), atol=1e-7):
        ends = [f"{betas[0]:.3g} to {betas[-1]:.3g}" for betas in (own.betas, scheduler.betas)]
        raise UserError(f"{where}: trained with betas from {ends[0]}, the model with {ends[1]}")
    return classifier.requires_grad_(False).eval().to(unet.device), classes
