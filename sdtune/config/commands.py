"""The commands by name, as --help lists them; the config class of a command is imported when it is asked for."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sdtune.config.section_base import Section
    from sdtune.config.sections import Run
    from sdtune.config.verbs import Verb


class Command(NamedTuple):
    """A command before anything of it is imported."""

    config: str
    """`module:Class` of its options, below sdtune.config."""
    summary: str
    """What --help says of it: the docstring of that class."""
    panel: str = "Train"
    """Where --help lists it."""

    def load(self) -> "type[Section]":
        """The class of its options."""
        module, _, name = self.config.partition(":")
        found: type[Section] = getattr(importlib.import_module(f"sdtune.config.{module}"), name)
        return found


METHODS = {
    "lora": Command("methods.lora:LoraConfig", "Low-rank adapters on a text-to-image model (LoRA; Hu et al. 2021)."),
    "dreambooth": Command(
        "methods.dreambooth:DreamBoothConfig",
        "A subject or style from a handful of images (DreamBooth; Ruiz et al. 2022), all weights or as LoRA.",
    ),
    "custom-diffusion": Command(
        "methods.custom_diffusion:CustomDiffusionConfig",
        "One or several subjects, each a new word, in what reads the text (Custom Diffusion; Kumari et al. 2023).",
    ),
    "textual-inversion": Command(
        "methods.textual_inversion:TextualInversionConfig",
        "A new word for what a few images show; nothing of the base moves (Textual Inversion; Gal et al. 2022).",
    ),
    "text-to-image": Command(
        "methods.text_to_image:TextToImageConfig",
        "Full fine-tuning of a text-to-image model's denoiser (Rombach et al. 2022).",
    ),
    "controlnet": Command(
        "methods.controlnet:ControlNetConfig",
        "A copy of the base's encoder that follows an image, such as edges (ControlNet; Zhang et al. 2023).",
    ),
    "t2i-adapter": Command(
        "methods.t2i_adapter:T2IAdapterConfig",
        "A small network that gives the base features of an image to follow (T2I-Adapter; Mou et al. 2023).",
    ),
    "instruct-pix2pix": Command(
        "methods.instruct_pix2pix:InstructPix2PixConfig",
        "Edit an image as an instruction says (InstructPix2Pix; Brooks et al. 2023).",
    ),
    "ddpm": Command(
        "methods.ddpm:DdpmConfig",
        "A diffusion model of pixels, from scratch or continued, with classes or without (DDPM; Ho et al. 2020).",
    ),
    "super-resolution": Command(
        "methods.super_resolution:SuperResolutionConfig",
        "A diffusion model of pixels that enlarges small images, a stage of a cascade (Ho et al. 2021).",
    ),
    "lcm": Command(
        "methods.lcm:LcmConfig",
        "Pictures in one to eight steps, learnt from the base itself (LCM; Luo et al. 2023), all weights or as LoRA.",
    ),
    "guidance-distillation": Command(
        "methods.guidance_distillation:GuidanceDistillationConfig",
        "Guided pictures in half as many steps, phase after phase, guidance told to one network (Meng et al. 2023).",
    ),
    "reflow": Command(
        "methods.reflow:ReflowConfig",
        "A flow-matching base in one or a few steps: its paths made straight (reflow; Liu et al. 2022), or as LoRA.",
    ),
    "progressive": Command(
        "methods.progressive:ProgressiveConfig",
        "A model of pixels in half as many steps, phase after phase (progressive distillation; Salimans & Ho 2022).",
    ),
    "consistency": Command(
        "methods.consistency:ConsistencyConfig",
        "A model of pixels in one or a few steps, distilled or from scratch (consistency models; Song et al. 2023).",
    ),
    "autoencoder": Command(
        "methods.autoencoder:AutoencoderConfig",
        "The autoencoder (VAE) of a base, its decoder alone or both halves (AutoencoderKL; Rombach et al. 2022).",
    ),
    "clip": Command(
        "methods.clip:ClipConfig",
        "A CLIP of pictures and captions, from nothing or continued (Radford et al. 2021).",
    ),
    "prior": Command(
        "methods.unclip_prior:PriorConfig",
        "From captions to CLIP embeddings of pictures: the prior of unCLIP and Kandinsky 2.2 (Ramesh et al. 2022).",
    ),
    "image-decoder": Command(
        "methods.image_decoder:ImageDecoderConfig",
        "From CLIP embeddings of pictures to pictures: the decoder of unCLIP and Kandinsky 2.2 (Ramesh et al. 2022).",
    ),
    "classifier": Command(
        "methods.classifier:ClassifierConfig",
        "A classifier of noised images, which guides a diffusion model (Dhariwal & Nichol 2021).",
    ),
}
"""The commands that train."""

VERBS = {
    "sample": Command(
        "verbs:SampleConfig",
        "Images from a base model, any adapters, and prompts; or from a model of pixels, and classes.",
        "Use",
    ),
    "evaluate": Command(
        "verbs:EvaluateConfig",
        "How close images are to a reference, and to their prompts and classes: FID and the like, with intervals.",
        "Look",
    ),
    "push": Command(
        "verbs:PushConfig",
        "Upload a run to the Hugging Face Hub: artefact, card, samples, config, metrics and report.",
        "Use",
    ),
    "watch": Command(
        "verbs:WatchConfig", "How far runs are, with their last loss and score: a table that stays up to date.", "Look"
    ),
    "compare": Command(
        "verbs:CompareConfig",
        "Runs beside each other on one page: settings, curves, samples, scores, time, memory, size.",
        "Look",
    ),
    "convert": Command("verbs:ConvertConfig", "An adapter file in another format, checked to do the same.", "Use"),
    "merge": Command(
        "verbs:MergeConfig",
        "Adapters into a base, several adapters into one, two models into an adapter, a rank into a smaller one.",
        "Use",
    ),
    "inspect": Command(
        "verbs:InspectConfig",
        "What an adapter file is: kind, base, rank, targets, how it was trained, and where it changes the model.",
        "Look",
    ),
}
"""The commands that do not train."""


def methods() -> "tuple[type[Run], ...]":
    """The config classes of all methods, in the order of the table."""
    return tuple(command.load() for command in METHODS.values())  # type: ignore[misc]


def verbs() -> "tuple[type[Verb], ...]":
    """The config classes of the commands that do not train."""
    return tuple(command.load() for command in VERBS.values())  # type: ignore[misc]


def config_class(settings: Mapping[str, Any]) -> "type[Run]":
    """The config class of a run's ``config.yaml``; of a recipe of one's own, the one whose keys are most alike.

    The runs of a time when `method` was not written down were all LoRA.
    """
    name = settings.get("method", "lora")
    if isinstance(name, str) and name in METHODS:
        return METHODS[name].load()  # type: ignore[return-value]
    keys = settings.keys()
    return max(methods(), key=lambda c: len(keys & c.model_fields.keys()) / len(keys | c.model_fields.keys()))
