"""From names to a pipeline: the base model, and adapters on it with their weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers import DiffusionPipeline

from sdtune import families
from sdtune.adapters import FILE
from sdtune.configs import UserError
from sdtune.precision import DTYPES
from sdtune.verbs import SampleConfig

EMBEDDING = "learned_embeds.safetensors"


def load_pipeline(cfg: SampleConfig) -> DiffusionPipeline:
    """The base of ``cfg`` on the best device here, without safety checker and progress bars.

    Raises `UserError` for a pickle, a missing folder and a folder that holds no pipeline.
    """
    families.hush()
    dtype = DTYPES[cfg.mixed_precision]
    device = best_device()
    if cfg.mixed_precision == "fp16" and device == "cpu":
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


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``, the first there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load_adapter(pipe: DiffusionPipeline, where: str, name: str) -> None:
    file = published_file(where, FILE, "--adapter")
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
    beside = [folder for folder, _ in map(split_weight, adapters) if (Path(folder) / EMBEDDING).is_file()]
    for where in dict.fromkeys([*beside, *embeddings]):
        file = published_file(where, EMBEDDING, "--embedding")
        families.tensor_names(file)  # a clear word where it is no safetensors file
        try:
            pipe.load_textual_inversion(str(file.parent), weight_name=file.name)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"--embedding {where}: does not fit this base: {why}") from error


def published_file(where: str, name: str, option: str) -> Path:
    """The ``.safetensors`` of an artefact given as file, folder, run folder or ``user/name[/file]`` (Hub).

    Args:
        name: of the file in a folder that has several; ``option`` is what an error calls it by.
    """
    path = Path(where)
    if path.is_dir():
        files = [path / name] if (path / name).is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{option} {where}: no .safetensors in it; a run writes its own when it ends")
        if len(files) > 1:
            raise UserError(f"{option} {where}: {len(files)} .safetensors in it; name the file")
        return files[0]
    if path.suffix in families.PICKLES:
        raise UserError(f"{option} {where}: a pickle, which can run code when it is read; only .safetensors")
    if path.is_file():
        return path
    user, _, rest = where.partition("/")
    repo, _, file = rest.partition("/")
    if not (user and repo) or where.startswith((".", "/")):
        raise UserError(f"{option} {where}: no such file or folder")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{user}/{repo}", file or name))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{option} {where}: no such file or folder, and not on the Hub: {why}") from error
