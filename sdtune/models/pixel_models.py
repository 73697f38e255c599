"""Diffusion models of pixels: a ``UNet2DModel`` from a description or a saved one, and the folder it is saved in.

The folder is that of a stock ``DDPMPipeline``: ``model_index.json``, ``unet/``, ``scheduler/``. A model with K classes
has an embedding of K + 1, the last of which is the null class, and ``classes.json``, the names in label order.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.part_files import BROKEN, check_scheduler, has_part, read_part, reason
from sdtune.models.pipeline_folder import verify_module, write_folder, write_pipeline
from sdtune.models.pixel_networks import check_halvings, levels, residual_blocks, sample_size, sides_of
from sdtune.run.sampling_file import SAMPLING, Sampling
from sdtune.run.usage import CLASSES


class PixelModel(NamedTuple):
    """A saved model to continue, or the description of a network to make."""

    network: dict[str, Any]
    """Arguments of ``UNet2DModel``, without what depends on the data."""
    scheduler: dict[str, Any] | None = None
    """``scheduler_config.json``; ``None`` from scratch."""
    classes: list[str] | None = None
    """Names in label order, empty for a model without classes; ``None`` from scratch."""
    weights: dict[str, Any] | None = None

    @property
    def channels(self) -> int | None:
        """Channels of its input; ``None`` where the data decides."""
        return self.network.get("in_channels")

    @property
    def learned_variance(self) -> bool:
        """Whether its output has a second half, the variance."""
        return self.network.get("out_channels", 3) == 2 * self.network.get("in_channels", 3)


def plan(cfg: Any) -> PixelModel:
    """What ``--model``, ``--unet-config`` or the options of Network describe.

    Raises:
        UserError: it cannot be read, or is no model of pixels.
    """
    if cfg.model:
        return _saved(cfg)
    return PixelModel(_described(cfg.unet_config) if cfg.unet_config else levels(cfg) | residual_blocks(cfg))


def build(
    cfg: Any, model: PixelModel, channels: int, classes: list[str], learned_variance: bool = False
) -> UNet2DModel:
    """The network, with its weights where it is continued.

    Args:
        learned_variance: its output has as many channels again, for the variance.

    Raises:
        UserError: it cannot be made, halves the images to a fraction of a pixel, or is not made for such a variance.
    """
    check_halvings(cfg, len(model.network["block_out_channels"]))
    if model.learned_variance and not learned_variance:
        told = f"--model {cfg.model}" if cfg.model else f"--unet-config {cfg.unet_config}"
        raise UserError(f"{told}: learned its variance, which only sdtune ddpm --variance-type learned_range trains")
    if learned_variance and model.weights is not None and not model.learned_variance:
        raise UserError(f"--variance-type learned_range: --model {cfg.model} has no channels for it; leave it out")
    out = channels * (1 + learned_variance)
    chosen = model.network | {"sample_size": sample_size(cfg), "in_channels": channels, "out_channels": out}
    if classes:
        chosen["num_class_embeds"] = len(classes) + 1
    try:
        unet = UNet2DModel.from_config(chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"--unet-config {cfg.unet_config}: {str(error).splitlines()[0]}") from None
    if model.weights is not None:
        unet.load_state_dict(model.weights)
    return unet


def classifier(cfg: Any, channels: int, classes: int) -> NoisyClassifier:
    """The network that the options of Network describe, without its decoder. Raises: UserError, as `build` does."""
    check_halvings(cfg, len(cfg.block_out_channels))
    given = {k: v for k, v in levels(cfg).items() if k in NoisyClassifier.__init__.__annotations__}
    return NoisyClassifier(sample_size(cfg), channels, classes, **given)


def require_resolution(cfg: Any, model: PixelModel) -> None:
    """Raises: UserError where a model that is distilled makes images of another size than those it is distilled on."""
    own, given = sides_of(model.network["sample_size"]), sides_of(sample_size(cfg))
    if own != given:
        raise UserError(
            f"--resolution {cfg.resolution}: --model {cfg.model} makes images of {own[1]} x {own[0]} pixels, "
            f"not {given[1]} x {given[0]}"
        )


def describe(unet: UNet2DModel) -> str:
    """The network in one line, for the log."""
    height, width = sides_of(unet.config.sample_size)
    shapes = [(width >> level, height >> level) for level in range(len(unet.config.block_out_channels))]
    sides = [str(w) if w == h else f"{w} x {h}" for w, h in shapes]
    attends = [side for side, kind in zip(sides, unet.config.down_block_types, strict=True) if "Attn" in kind]
    doubled = unet.config.out_channels > unet.config.in_channels
    channels = f"{unet.config.in_channels} channels in{', twice as many out' if doubled else ' and out'}"
    return (
        f"network: {channels}, levels of {', '.join(sides)} pixels, attention at {', '.join(attends) or 'none of them'}"
    )


def save(out: Path, unet: UNet2DModel, scheduler: DDPMScheduler, classes: list[str]) -> list[Path]:
    """Write the folder that `DDPMPipeline.from_pretrained` reads, whole or not at all; the files it consists of."""
    return write_pipeline(out, DDPMPipeline(unet, scheduler), {CLASSES: classes_json(classes)} if classes else {})


def save_pipeline(out: Path, pipeline: Any, classes: list[str], sampling: Sampling) -> list[Path]:
    """Write a distilled model as a pipeline of another class; whole or not at all; the files it consists of."""
    named = {CLASSES: classes_json(classes)} if classes else {}
    return write_pipeline(out, pipeline, named | {SAMPLING: sampling.to_bytes()})


def save_classifier(out: Path, classifier: NoisyClassifier, scheduler: DDPMScheduler, classes: list[str]) -> list[Path]:
    """Write the folder that `NoisyClassifier.from_pretrained` reads, whole or not at all; the files it consists of."""

    def fill(new: Path) -> None:
        classifier.save_pretrained(new)
        scheduler.save_pretrained(new / "scheduler")
        (new / CLASSES).write_bytes(classes_json(classes))
        verify_module(new, classifier)

    return write_folder(out, fill)


def classes_json(classes: list[str]) -> bytes:
    """Names in label order as ``classes.json`` holds them."""
    return (json.dumps(classes, ensure_ascii=False, indent=1) + "\n").encode()


# ---- reading -------------------------------------------------------------------------------------------


def _saved(cfg: Any) -> PixelModel:
    source = families.resolve_model(cfg.model)
    index = families.model_index(source, cfg)
    if (index.get("unet") if has_part(index, "unet") else [None, None])[1] != "UNet2DModel":
        raise UserError(
            f"--model {cfg.model}: a {index.get('_class_name', 'pipeline')} without a UNet2DModel; "
            "ddpm continues models of pixels, such as it writes itself"
        )
    where = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}
    unet = read_part(UNet2DModel, source, f"--model {cfg.model}: unet", subfolder="unet", **where)
    try:
        scheduler = DDPMScheduler.load_config(source, subfolder="scheduler", **where)
    except BROKEN as error:
        raise UserError(f"--model {cfg.model}: scheduler: {reason(error)}") from None
    check_scheduler(scheduler, f"--model {cfg.model}: scheduler")
    if "beta_schedule" not in scheduler:
        raise UserError(f"--model {cfg.model}: its {scheduler.get('_class_name')} knows no betas, so it is no DDPM")
    network = _checked(dict(unet.config), f"--model {cfg.model}")
    embedded = network.pop("num_class_embeds", None)
    classes = named_classes(cfg, source, embedded)
    public = {k: v for k, v in scheduler.items() if not k.startswith("_")}
    return PixelModel(network, public, classes, unet.state_dict())


def named_classes(cfg: Any, source: str, embedded: int | None) -> list[str]:
    """The classes of a model of pixels in the order of their labels, empty for one without.

    Args:
        embedded: rows of the network's class embedding, the last of which is the null class.

    Raises:
        UserError: nothing names them, or not as many as there are.
    """
    if not embedded:
        return []
    classes = read_classes(source, f"--model {cfg.model}", cfg.revision, cfg.cache_dir)
    if classes is None:
        raise UserError(f"--model {cfg.model}: has classes, but no {CLASSES} that names them")
    if embedded != len(classes) + 1:
        raise UserError(
            f"--model {cfg.model}: {CLASSES} names {len(classes)} classes, but the network has {embedded - 1} "
            "and the null class"
        )
    return classes


def read_classes(
    source: str, where: str, revision: str | None = None, cache_dir: Path | None = None
) -> list[str] | None:
    """What ``classes.json`` names in a folder or Hub repository; ``None`` where there is no such file.

    Args:
        where: the option and its value, with which an error begins.

    Raises:
        UserError: it cannot be read, or is no list of names.
    """
    try:
        file = Path(source) / CLASSES
        if not Path(source).is_dir():
            file = Path(hf_hub_download(source, CLASSES, revision=revision, cache_dir=cache_dir))
        classes = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, EntryNotFoundError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {CLASSES}: {str(error).splitlines()[0]}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: {CLASSES} is no list of names")
    return classes


def _described(asked: Path) -> dict[str, Any]:
    """The network that a file describes, or one in a folder as diffusers writes it."""
    inside = [asked / "config.json", asked / "unet" / "config.json"] if asked.is_dir() else [asked]
    file = next((path for path in inside if path.is_file()), inside[0])
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "; of a model on the Hub, download its config.json, or continue it with --model"
        raise UserError(f"--unet-config {file}: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--unet-config {file}: not JSON ({error})") from None
    if not isinstance(found, dict) or "block_out_channels" not in found:
        raise UserError(f"--unet-config {file}: wants the config.json of a UNet2DModel, with its block_out_channels")
    network = _checked(found, f"--unet-config {file}")
    network.pop("num_class_embeds", None)
    return network


def _checked(config: dict[str, Any], asked: str) -> dict[str, Any]:
    """A network's own settings, without where it came from."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise UserError(f"{asked}: a {kind}, not a UNet2DModel")
    if config.get("out_channels", 3) / config.get("in_channels", 3) not in (1, 2):
        raise UserError(f"{asked}: its output has neither the channels of its input nor, for a variance, twice as many")
    if config.get("class_embed_type"):
        raise UserError(f"{asked}: class_embed_type {config['class_embed_type']}; classes are an embedding here (none)")
    return {k: v for k, v in config.items() if not k.startswith("_")}
