"""The kind of artefact a run made, judged by its file names, and the lines of stock diffusers that use it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sdtune.run.markdown import code_span
from sdtune.run.sampling_file import SAMPLING, Sampling

PEFT = "adapter"
"""The folder into which the lines of a LoHa or LoKr have it converted."""
EMBEDDING = "learned_embeds.safetensors"
ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
"""Names of the tables of a word that several text encoders learnt, or ComfyUI reads, to the encoder of each."""
CLASSES = "classes.json"
"""Names of classes in the order of their labels, beside a model that knows classes."""
FROM_PICTURES = ("StableDiffusionXLImg2ImgPipeline",)
"""Classes of pipelines that are called with a picture beside the prompt."""
LYCORIS_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""How the keys of each part begin in the file of a LoHa or LoKr."""
CONTROLS = {"ControlNetModel": "controlnet", "T2IAdapter": "adapter"}
"""Class of a network that follows an image -> what pipelines call this part."""
CONSISTENCY = "ConsistencyModelPipeline"
MANY = 30
"""At most this many classes are listed; for more, the file with their names is named."""


class ArtefactKind(NamedTuple):
    """An adapter, an embedding, or both; a pipeline; a control network; or a classifier of noised images."""

    adapter: str | None = None
    """Name of the file."""
    embedding: str | None = None
    """Name of the file."""
    tables: tuple[str, ...] = ()
    """Keys of its tables where each text encoder has one; empty for the one table of one encoder."""
    pipeline: str | None = None
    """Class of diffusers."""
    peft_parts: tuple[str, ...] = ()
    """Parts that a LoHa or LoKr adapts, which PEFT loads; none for a LoRA, which diffusers loads."""
    takes_text: bool = True
    classifier: dict[str, Any] | None = None
    """Its settings, from config.json."""
    control: str | None = None
    """Class of diffusers, of a network that follows an image."""
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
        """Whether it is a pipeline that edits an image."""
        return "InstructPix2Pix" in (self.pipeline or "")


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
            takes_text=any(part.startswith("text_encoder") for part in index),
            classes=classes if labels else (),
            open_label=labels - 1 if labels == len(classes) + 1 else None,
            sampling=sampling,
        )
    if "diffusion_pytorch_model.safetensors" in files and (config := read_json("config.json")):
        if config["_class_name"] in CONTROLS:
            return ArtefactKind(control=config["_class_name"], of_sdxl=config.get("adapter_type") == "full_adapter_xl")
        return ArtefactKind(takes_text=False, classifier=config, classes=classes)
    adapter = next((name for name in files if name.endswith(".safetensors") and name != EMBEDDING), None)
    parts = _lycoris_parts(files[adapter]) if adapter else ()
    if EMBEDDING not in files:
        return ArtefactKind(adapter=adapter, peft_parts=parts, sampling=sampling)
    tables = _tables(files[EMBEDDING])
    return ArtefactKind(adapter=adapter, embedding=EMBEDDING, tables=tables, peft_parts=parts)


def _tables(file: Path) -> tuple[str, ...]:
    """The keys of an embedding's tables, if they are names of text encoders."""
    with safe_open(file, framework="np") as tensors:
        keys = set(tensors.keys())
    return tuple(key for key in ENCODERS if key in keys) if keys <= ENCODERS.keys() else ()


def _lycoris_parts(file: Path) -> tuple[str, ...]:
    """The parts that a file in LyCORIS' layout adapts; none if it holds no LoHa and no LoKr."""
    try:
        with safe_open(file, framework="np") as tensors:
            keys = list(tensors.keys())
    except (OSError, SafetensorError):  # a report is made of a damaged folder too
        return ()
    if not any(".hada_" in key or ".lokr_" in key for key in keys):
        return ()
    return tuple(dict.fromkeys(p for prefix, p in LYCORIS_PREFIXES.items() if any(k.startswith(prefix) for k in keys)))


def sample(what: ArtefactKind, folder: str, prompt: str) -> list[str]:
    """The words of the ``sdtune sample`` command that uses the artefact of a run in ``folder``."""
    if what.classifier:
        return ["sdtune", "sample", "--model", "...", "--classifier", folder, "--class", what.classes[0]]
    if what.control:
        return ["sdtune", "sample", "--control", folder, "--image", "FILE", "--prompt", prompt]
    if what.edits:
        return ["sdtune", "sample", "--model", folder, "--image", "FILE", "--prompt", prompt]
    kind = "--model" if what.pipeline else "--embedding" if what.embedding and not what.adapter else "--adapter"
    options = ["--steps", str(what.sampling.steps)] if what.sampling else []
    if what.sampling and what.sampling.guidance_scale is not None:
        options += ["--guidance-scale", f"{what.sampling.guidance_scale:g}"]
    return ["sdtune", "sample", kind, folder, *(["--prompt", prompt] if what.takes_text else []), *options]


def lines(
    what: ArtefactKind,
    repo: str,
    at: str | None,
    base: str,
    base_at: str | None,
    prompt: str,
    token: str | None,
    clip_skip: int | None = None,
    long_prompts: bool = False,
    base_class: str = "",
) -> str:
    """Python code that loads an artefact and makes an image.

    Args:
        repo: repository or folder of the artefact; ``at``: its branch.
        base: the model that an adapter or an embedding is for; ``base_at``: its revision.
        token: the new word of an embedding, in case its file does not name it.
        clip_skip: the layer of the text encoder that it was trained at, counted from the last.
        long_prompts: whether captions were read in several windows, which the stock call does not do.
        base_class: the pipeline class of the base, if it is known.
    """
    if what.classifier:
        return _classifier(what.classifier, repo, at)
    if what.pipeline:
        return _pipeline(what, repo, at, prompt)
    if what.control:
        return _control(what.control, what.of_sdxl, repo, at, base, base_at, prompt)
    reader = "DiffusionPipeline.from_pretrained"
    if base.endswith(".safetensors"):
        reader = f"{base_class or 'StableDiffusionPipeline'}.from_single_file"
    loads = [f"pipe = {reader}({arguments(base, revision=base_at)})"]
    imports = [f"from diffusers import {reader.partition('.')[0]}"]
    if clip_skip and clip_skip > 1:
        loads.append(f"layers = pipe.text_encoder.encoder.layers[:{1 - clip_skip}]  # clip skip {clip_skip}")
        loads.append("pipe.text_encoder.encoder.layers = layers")
    # The word first: an adapter of the text encoder may have been trained with it
    if what.embedding and what.tables:
        loads += _tables_loaded(what, repo, at, token, imports)
    elif what.embedding:
        words = arguments(repo, weight_name=what.embedding, token=token, revision=at)
        loads.append(f"pipe.load_textual_inversion({words})")
    if what.peft_parts:
        imports.insert(0, f"# first, in a shell: {shlex.join(['sdtune', 'convert', repo, PEFT, '--to', 'peft'])}")
        imports.append("from peft import PeftModel")
        loads += [f'PeftModel.from_pretrained(pipe.{part}, "{PEFT}", subfolder="{part}")' for part in what.peft_parts]
    elif what.adapter:
        loads.append(f"pipe.load_lora_weights({arguments(repo, weight_name=what.adapter, revision=at)})")
    if long_prompts:
        loads.append("# prompts over 77 tokens: sdtune sample --long-prompts")
    if what.sampling and what.sampling.lcm is not None:
        imports[0] += ", LCMScheduler"
        options = "".join(f", {name}={value}" for name, value in what.sampling.lcm.items())
        loads.append(f"pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config{options})")
    call = [text(prompt), *_call(what.sampling)]
    if base_class in FROM_PICTURES:
        imports.append("from diffusers.utils import load_image")
        loads.append('picture = load_image("...")')
        call.append("image=picture")
    loads.append(f"image = pipe({', '.join(call)}).images[0]")
    return "\n".join([*imports, "", *loads])


def _tables_loaded(what: ArtefactKind, repo: str, at: str | None, token: str | None, imports: list[str]) -> list[str]:
    """Lines that teach each text encoder its table of a word; adds what they import to ``imports``."""
    file = text(f"{repo}/{what.embedding}")
    if repo.count("/") == 1:  # a repository, and no folder
        imports.append("from huggingface_hub import hf_hub_download")
        file = f"hf_hub_download({arguments(repo, filename=what.embedding, revision=at)})"
    imports.append("from safetensors.torch import load_file")
    loads = [f"tables = load_file({file})"]
    for key in what.tables:
        encoder = ENCODERS[key]
        parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
        loads.append(f"pipe.load_textual_inversion(tables[{text(key)}], token={text(token or '...')}, {parts})")
    return loads


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


def _call(sampling: Sampling | None) -> list[str]:
    """Arguments of a stock pipeline's call that sample a distilled model as it was made to be."""
    if sampling is None:
        return []
    guidance = sampling.guidance_scale
    return [f"num_inference_steps={sampling.steps}", *([] if guidance is None else [f"guidance_scale={guidance}"])]


def _pipeline(what: ArtefactKind, repo: str, at: str | None, prompt: str) -> str:
    load = f"pipe = DiffusionPipeline.from_pretrained({arguments(repo, revision=at)})"
    given = [text(prompt)] if what.takes_text else []
    if what.classes and what.pipeline == CONSISTENCY:  # its call takes the class, which the others do not
        given.append("class_labels=[0]")
    draw = f"image = pipe({', '.join([*given, *_call(what.sampling)])}).images[0]"
    if what.edits or what.pipeline in FROM_PICTURES:
        draw = f"image = pipe({text(prompt)}, image=load_image({text('...')})).images[0]"
        return f"from diffusers import DiffusionPipeline\nfrom diffusers.utils import load_image\n\n{load}\n{draw}"
    if not what.classes or what.pipeline == CONSISTENCY:
        return f"from diffusers import DiffusionPipeline\n\n{load}\n{draw}"
    return f"""from functools import partial

import torch
from diffusers import DiffusionPipeline

{load}
labels = torch.tensor([0])  # {json.dumps(what.classes[0], ensure_ascii=False)}
pipe.unet.forward = partial(pipe.unet.forward, class_labels=labels)
{draw}"""


def _control(kind: str, of_sdxl: bool, repo: str, at: str | None, base: str, base_at: str | None, prompt: str) -> str:
    part = CONTROLS[kind]
    pipeline = (
        "AutoPipelineForText2Image" if part == "controlnet" else f"StableDiffusion{'XL' * of_sdxl}AdapterPipeline"
    )
    return f"""from diffusers import {pipeline}, {kind}
from diffusers.utils import load_image

{part} = {kind}.from_pretrained({arguments(repo, revision=at)})
pipe = {pipeline}.from_pretrained({arguments(base, revision=base_at)}, {part}={part})
image = pipe({text(prompt)}, image=load_image("condition.png")).images[0]"""


def _classifier(config: Mapping[str, Any], repo: str, at: str | None) -> str:
    name, size = config["_class_name"], config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"""import torch
from sdtune.noisy_classifier import {name}

classifier = {name}.from_pretrained({arguments(repo, revision=at)})
x_t = torch.randn(1, {config["in_channels"]}, {height}, {width})  # noised images
t = torch.tensor([500])  # their timesteps
p = classifier(x_t, t).softmax(dim=1)"""


def classes(what: ArtefactKind) -> str:
    """A sentence that lists labels and classes; empty for a model without classes."""
    if not what.classes:
        return ""
    if len(what.classes) > MANY:
        named = f"The {len(what.classes)} classes are listed in `classes.json`, in the order of their labels."
    else:
        named = f"Labels: {', '.join(f'{label} is {code_span(name)}' for label, name in enumerate(what.classes))}."
    return named + (f" Label {what.open_label} leaves the class open." if what.open_label is not None else "")


def arguments(first: str, **more: str | None) -> str:
    return ", ".join([text(first), *(f"{name}={text(value)}" for name, value in more.items() if value)])


def text(value: str) -> str:
    """A Python literal."""
    return json.dumps(value, ensure_ascii=False)
