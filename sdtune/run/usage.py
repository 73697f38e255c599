"""The kind of artefact a run made, judged by its file names, and the command that makes images with it."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sdtune.run.markdown import code_span
from sdtune.run.sampling_file import SAMPLING, Sampling

ATTENTION = "pytorch_custom_diffusion_weights.safetensors"
"""Keys and values of the cross-attention, under the name that diffusers has for them."""
EMBEDDING = "learned_embeds.safetensors"
EMBEDDINGS = re.compile(r"learned_embeds(_\d+)?\.safetensors")
"""Names of the files of new words: `EMBEDDING`, and with further words ``learned_embeds_2.safetensors`` and so on."""
ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
"""Names of the tables of a word that several text encoders learnt, or ComfyUI reads, to the encoder of each."""
CLASSES = "classes.json"
"""Names of classes in the order of their labels, beside a model that knows classes."""
LYCORIS_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""How the keys of each part begin in the file of a LoHa or LoKr."""
CONTROLS = {
    "ControlNetModel": "controlnet",
    "SD3ControlNetModel": "controlnet",
    "FluxControlNetModel": "controlnet",
    "T2IAdapter": "adapter",
}
"""Class of a network that follows an image -> what pipelines call this part."""
SUPER_RESOLUTION = "IFSuperResolutionPipeline"
"""Class of the pipeline of a model of pixels that enlarges."""
AUTOENCODER, CLASSIFIER = "AutoencoderKL", "NoisyClassifier"
PRIOR, DECODER = "KandinskyV22PriorPipeline", "KandinskyV22Pipeline"
"""Classes of diffusers, of the pipelines of unCLIP: one draws embeddings, and the other pictures of embeddings."""
CLIP = "CLIPModel"
"""Class of transformers, of a model that compares pictures with captions."""
MANY = 30
"""At most this many classes are listed; for more, the file with their names is named."""


class ArtefactKind(NamedTuple):
    """An adapter or weights of the cross-attention, new words, or both; a pipeline; a network that follows an image; an
    autoencoder; a CLIP; or a classifier of noised images.
    """

    adapter: str | None = None
    """Name of the file."""
    attention: str | None = None
    """Name of the file with weights of the cross-attention."""
    embeddings: tuple[str, ...] = ()
    """Names of the files of new words, one each."""
    tables: tuple[str, ...] = ()
    """Keys of its tables where each text encoder has one; empty for the one table of one encoder."""
    pipeline: str | None = None
    """Class of diffusers."""
    peft_parts: tuple[str, ...] = ()
    """Parts that a LoHa or LoKr adapts, which PEFT loads; none for a LoRA, which diffusers loads."""
    takes_text: bool = True
    of_prior: bool = False
    """Whether it is a prior of unCLIP, whole or as an adapter: a decoder draws what it says."""
    of_decoder: bool = False
    """Whether it is a decoder of unCLIP, whole or as an adapter: it draws what a prior says."""
    classifier: dict[str, Any] | None = None
    """Its settings, from config.json."""
    control: str | None = None
    """Class of diffusers, of a network that follows an image."""
    autoencoder: bool = False
    clip: bool = False
    of_sdxl: bool = False
    """Whether it is a T2I-Adapter of SDXL, for which the pipeline has another name."""
    classes: tuple[str, ...] = ()
    """Names in the order of their labels; empty for a model without classes."""
    open_label: int | None = None
    """The label that means no class, if the model has one."""
    sampling: Sampling | None = None
    """How a distilled model is sampled; ``None`` where the caller chooses."""

    @property
    def edits(self) -> bool:
        """Whether it is a pipeline that edits an image, or enlarges it."""
        return any(name in (self.pipeline or "") for name in ("InstructPix2Pix", "Upscale", SUPER_RESOLUTION))


def artefact_kind(files: Mapping[str, Path]) -> ArtefactKind:
    """The kind of an artefact, from its files by their path in its folder."""

    def read_json(name: str) -> Any:
        return json.loads(files[name].read_text(encoding="utf-8")) if name in files else None

    classes = tuple(map(str, read_json(CLASSES) or ()))
    sampling = Sampling.read(files[SAMPLING]) if SAMPLING in files else None
    if index := read_json("model_index.json"):
        labels = (read_json("unet/config.json") or {}).get("num_class_embeds") or 0
        return ArtefactKind(
            pipeline=index["_class_name"],
            takes_text=any(part.startswith("text_encoder") and value[0] for part, value in index.items()),
            of_prior=index["_class_name"] == PRIOR,
            of_decoder=index["_class_name"] == DECODER,
            classes=classes if labels else (),
            open_label=labels - 1 if labels == len(classes) + 1 else None,
            sampling=sampling,
        )
    if "diffusion_pytorch_model.safetensors" in files and (config := read_json("config.json")):
        kind = config["_class_name"]
        if kind == CLASSIFIER:
            return ArtefactKind(takes_text=False, classifier=config, classes=classes)
        if kind in CONTROLS:
            return ArtefactKind(control=kind, of_sdxl=config.get("adapter_type") == "full_adapter_xl")
        return ArtefactKind(autoencoder=kind == AUTOENCODER)
    if "model.safetensors" in files and CLIP in ((read_json("config.json") or {}).get("architectures") or ()):
        return ArtefactKind(clip=True)
    words = word_files(files)
    tables = _tables(files[words[0]]) if words else ()
    if ATTENTION in files:
        return ArtefactKind(attention=ATTENTION, embeddings=words, tables=tables)
    adapter = next((name for name in files if name.endswith(".safetensors") and name not in words), None)
    parts = _lycoris_parts(files[adapter]) if adapter else ()
    if not words:
        found = ArtefactKind(adapter=adapter, peft_parts=parts, sampling=sampling)
        base = _base_class(files[adapter]) if adapter else None
        return found._replace(of_prior=base == PRIOR, of_decoder=base == DECODER)
    return ArtefactKind(adapter=adapter, embeddings=words, tables=tables, peft_parts=parts)


def word_file(k: int) -> str:
    """The name of the file of a run's new word number ``k``, from 0."""
    return EMBEDDING if k == 0 else EMBEDDING.replace(".", f"_{k + 1}.")


def word_files(names: Iterable[str]) -> tuple[str, ...]:
    """Those among ``names`` that are files of new words, in their order."""
    return tuple(sorted((name for name in names if EMBEDDINGS.fullmatch(name)), key=lambda name: (len(name), name)))


def _tables(file: Path) -> tuple[str, ...]:
    """The keys of an embedding's tables, if they are names of text encoders."""
    with safe_open(file, framework="np") as tensors:
        keys = set(tensors.keys())
    return tuple(key for key in ENCODERS if key in keys) if keys <= ENCODERS.keys() else ()


def _lycoris_parts(file: Path) -> tuple[str, ...]:
    """The parts that a file in LyCORIS' layout adapts; none if it holds no LoHa and no LoKr."""
    keys = _keys(file)
    if not any(".hada_" in key or ".lokr_" in key for key in keys):
        return ()
    return tuple(dict.fromkeys(p for prefix, p in LYCORIS_PREFIXES.items() if any(k.startswith(prefix) for k in keys)))


def _base_class(file: Path) -> str | None:
    """The class of the pipeline that an adapter is for, if its file says so."""
    try:
        with safe_open(file, framework="np") as tensors:
            found: str | None = json.loads((tensors.metadata() or {}).get("sdtune", "{}")).get("pipeline")
            return found
    except (OSError, SafetensorError, ValueError, AttributeError):
        return None


def _keys(file: Path) -> list[str]:
    """The names of the tensors in a file; none if it cannot be read."""
    try:
        with safe_open(file, framework="np") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError):  # a report is made of a damaged folder too
        return []


def sample(what: ArtefactKind, folder: str, prompt: str, base_class: str = "") -> list[str]:
    """The words of the ``sdtune sample`` command that uses the artefact of a run in ``folder``.

    Args:
        base_class: the pipeline class of the base, if it is known.
    """
    if what.classifier:
        return ["sdtune", "sample", "--model", "...", "--classifier", folder, "--class", what.classes[0]]
    if what.control:
        return ["sdtune", "sample", "--control", folder, "--image", "FILE", "--prompt", prompt]
    if what.autoencoder:
        return ["sdtune", "sample", "--vae", folder, "--prompt", prompt]
    if what.clip:
        asked = ["--clip-model", folder, "--clip-guidance-scale", "1", "--prompt", prompt]
        return ["sdtune", "sample", "--model", "...", *asked]
    if what.of_prior:
        used = ["--prior", folder] if what.pipeline else ["--prior", "...", "--adapter", folder]
        return ["sdtune", "sample", "--model", "...", *used, "--prompt", prompt]
    if what.of_decoder:
        used = ["--model", folder] if what.pipeline else ["--adapter", folder]
        return ["sdtune", "sample", *used, "--prior", "...", "--prompt", prompt]
    if what.edits:
        told = ["--prompt", prompt] if what.takes_text else []
        return ["sdtune", "sample", "--model", folder, "--image", "FILE", *told]
    word_alone = what.embeddings and not (what.adapter or what.attention)
    kind = "--model" if what.pipeline else "--embedding" if word_alone else "--adapter"
    options = ["--image", "FILE"] if "Upscale" in base_class else []
    options += ["--steps", str(what.sampling.steps)] if what.sampling else []
    if what.sampling and what.sampling.guidance_scale is not None:
        options += ["--guidance-scale", f"{what.sampling.guidance_scale:g}"]
    return ["sdtune", "sample", kind, folder, *(["--prompt", prompt] if what.takes_text else []), *options]


def single_file_class(file: Path) -> str:
    """The pipeline class of a base in one file, by the names of its tensors; empty where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError):
        return ""
    if any(".joint_blocks." in name for name in names):
        return "StableDiffusion3Pipeline"
    return f"StableDiffusion{'XL' if any(name.startswith('conditioner.') for name in names) else ''}Pipeline"


def classes(what: ArtefactKind) -> str:
    """A sentence that lists labels and classes; empty for a model without classes."""
    if not what.classes:
        return ""
    if len(what.classes) > MANY:
        named = f"The {len(what.classes)} classes are listed in `classes.json`, in the order of their labels."
    else:
        named = f"Labels: {', '.join(f'{label} is {code_span(name)}' for label, name in enumerate(what.classes))}."
    return named + (f" Label {what.open_label} leaves the class open." if what.open_label is not None else "")
