"""From names to a pipeline: the base model, and adapters on it with their weights."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models import families
from sdtune.models.formats.tensor_file import locate
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.pixel_models import read_classes
from sdtune.run.device import best_device
from sdtune.run.precision import DTYPES
from sdtune.run.usage import CLASSES, EMBEDDING


def load_pipeline(cfg: SampleConfig) -> DiffusionPipeline:
    """The base of ``cfg`` on the best device here, without safety checker and progress bars.

    Raises `UserError` for a pickle, a missing folder and a folder that holds no pipeline.
    """
    families.silence_libraries()
    dtype = DTYPES[cfg.mixed_precision]
    device = best_device()
    if cfg.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed-precision fp16: needs a GPU; bf16 works on a CPU")
    source = families.resolve_model(cfg.model)
    hub = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}
    parts: dict[str, Any] = {}
    try:
        if cfg.vae:
            vae = diffusers.AutoencoderKL.from_pretrained(cfg.vae, dtype=dtype, cache_dir=cfg.cache_dir)
            parts["vae"] = vae
        if cfg.unet:
            where = Path(cfg.unet) / "unet" if (Path(cfg.unet) / "unet").is_dir() else Path(cfg.unet)
            parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(where, dtype=dtype)
        if "safety_checker" in families.model_index(source, cfg):
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=cfg.variant, **hub, **parts)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {cfg.model}: {str(error).splitlines()[0]}") from error
    if cfg.unet and parts["unet"].config.cross_attention_dim != pipe.text_encoder.config.hidden_size:
        raise UserError(f"--unet {cfg.unet}: made for another text encoder than that of {cfg.model}")
    return pipe.to(device)


def load_adapters(pipe: DiffusionPipeline, adapters: Sequence[str]) -> None:
    """Load each ``PATH_OR_ID[=WEIGHT]`` into ``pipe`` and set the weights; `UserError` names what fails.

    diffusers loads a file of which it knows no key, and one made for another model in part, without an
    error: here every tensor of the file must have arrived.
    """
    names, weights = [], []
    for k, text in enumerate(adapters):
        where, weight = split_weight(text)
        names.append(f"adapter_{k}")
        weights.append(weight)
        _load_adapter(pipe, where, names[-1])
    if names:
        pipe.set_adapters(names, weights)


def split_weight(text: str) -> tuple[str, float]:
    """``runs/lora=0.8`` is (``runs/lora``, 0.8); without a number the weight is 1. Paths may hold a ``=``."""
    where, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: {number} is no weight")
    return where, weight


def _load_adapter(pipe: DiffusionPipeline, where: str, name: str) -> None:
    file = locate(where, option="--adapter")
    if file.name == EMBEDDING:
        raise UserError(f"--adapter {where}: holds a learnt word, not an adapter: give --embedding {where}")
    sent = [key for key in families.tensor_names(file) if not key.endswith(".alpha")]
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of each component that a file has nothing for
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        why = next((line for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise UserError(f"--adapter {where}: does not fit this base: {why.strip().splitlines()[0]}") from error
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    modules = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    arrived = sum(f".{name}." in f"{key}." for m in modules for key, _ in m.named_parameters())
    if arrived < len(sent):
        raise UserError(
            f"--adapter {where}: {arrived} of its {len(sent)} tensors fit this base; the first is {sent[0]}"
        )


def load_embeddings(pipe: DiffusionPipeline, embeddings: Sequence[str], adapters: Sequence[str] = ()) -> None:
    """Teach ``pipe`` the words of textual-inversion files, and of those that lie beside an adapter (pivotal tuning).

    Raises `UserError` for a file that is none, and a word that is known already.
    """
    learnt_with = [folder for folder, _ in map(split_weight, adapters) if (Path(folder) / EMBEDDING).is_file()]
    for where in dict.fromkeys([*learnt_with, *embeddings]):
        file = locate(where, EMBEDDING, "--embedding")
        families.tensor_names(file)  # a clear word where it is no safetensors file
        try:
            pipe.load_textual_inversion(str(file.parent), weight_name=file.name)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"--embedding {where}: does not fit this base: {why}") from error


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
    try:
        classifier = NoisyClassifier.from_pretrained(folder)
        own = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: not a classifier of noised images: {str(error).splitlines()[0]}") from error
    classes = read_classes(str(folder), where)
    if classes is None:
        raise UserError(f"{where}: not a classifier of noised images: no {CLASSES} in it")
    for what, name in {"channels": "in_channels", "pixels a side": "sample_size"}.items():
        if classifier.config[name] != unet.config[name]:
            raise UserError(f"{where}: made for {classifier.config[name]} {what}, the model for {unet.config[name]}")
    for name in ("num_train_timesteps", "beta_schedule"):
        if own.config[name] != scheduler.config.get(name):
            raise UserError(f"{where}: its {name} is {own.config[name]}, the model's {scheduler.config.get(name)}")
    if not torch.allclose(own.betas, scheduler.betas.cpu(), atol=1e-7):
        ends = [f"{betas[0]:.3g} to {betas[-1]:.3g}" for betas in (own.betas, scheduler.betas)]
        raise UserError(f"{where}: trained with betas from {ends[0]}, the model with {ends[1]}")
    return classifier.requires_grad_(False).eval().to(unet.device), classes
