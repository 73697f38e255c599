"""The lines of stock diffusers that load an artefact and make an image, for its card."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from sdtune.run.sampling_file import Sampling
from sdtune.run.usage import AUTOENCODER, CLIP, CONTROLS, ENCODERS, SUPER_RESOLUTION, ArtefactKind

PEFT = "adapter"
"""The folder into which the lines of a LoHa or LoKr have it converted."""
CONTROLS_OF_LATENTS = ("SD3ControlNetModel", "FluxControlNetModel")
"""Networks that follow the latents of an image, whose pipelines do not take the size from it."""
FROM_PICTURES = ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionUpscalePipeline")
"""Classes of pipelines that are called with a picture beside the prompt."""
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
"""Those that are called with a picture and a mask."""
PAINTED = "image=picture, mask_image=mask, width=picture.width, height=picture.height, strength=1.0"
LOADED = ['picture = load_image("...")', 'mask = load_image("...")  # white where to paint']
CONSISTENCY = "ConsistencyModelPipeline"


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
        base: the model that it is for, empty for none; ``base_at``: its revision.
        token: the new word of an embedding, in case its file does not name it.
        clip_skip: the layer of the text encoder that it was trained at, counted from the last.
        long_prompts: whether captions were read in several windows, which the stock call does not do.
        base_class: the pipeline class of the base, if it is known.
    """
    if what.classifier:
        return _classifier(what.classifier, repo, at)
    if what.of_prior or what.of_decoder:
        return _unclip(what, repo, at, base, base_at, prompt)
    if what.pipeline:
        return _pipeline(what, repo, at, prompt)
    if what.control:
        return _control(what.control, what.of_sdxl, repo, at, base, base_at, prompt)
    if what.autoencoder:
        return _autoencoder(repo, at, base, base_at, prompt)
    if what.clip:
        return _clip(repo, at, prompt)
    reader = "DiffusionPipeline.from_pretrained"
    if base.endswith(".safetensors"):
        reader = f"{base_class or 'StableDiffusionPipeline'}.from_single_file"
    loads = [f"pipe = {reader}({arguments(base, revision=base_at)})"]
    imports = [f"from diffusers import {reader.partition('.')[0]}"]
    if clip_skip and clip_skip > 1:
        loads.append(f"layers = pipe.text_encoder.encoder.layers[:{1 - clip_skip}]  # clip skip {clip_skip}")
        loads.append("pipe.text_encoder.encoder.layers = layers")
    if what.attention:
        weights = arguments(repo, weight_name=what.attention, revision=at)
        loads.append("# without _pipeline, load_attn_procs reads the file and changes nothing")
        loads.append(f"pipe.unet.load_attn_procs({weights}, _pipeline=pipe)")
    # The word first: an adapter of the text encoder may have been trained with it
    for file in what.embeddings:
        if what.tables:
            loads += _tables_loaded(what, file, repo, at, token, imports)
        else:
            words = arguments(repo, weight_name=file, token=token, revision=at)
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
    if base_class in INPAINTING:
        imports.append("from diffusers.utils import load_image")
        loads += LOADED
        call.append(PAINTED)
    loads.append(f"image = pipe({', '.join(call)}).images[0]")
    return "\n".join([*dict.fromkeys(imports), "", *loads])


def _tables_loaded(
    what: ArtefactKind, name: str, repo: str, at: str | None, token: str | None, imports: list[str]
) -> list[str]:
    """Lines that teach each text encoder its table of a word; adds what they import to ``imports``."""
    file = text(f"{repo}/{name}")
    if repo.count("/") == 1:  # a repository, and no folder
        imports.append("from huggingface_hub import hf_hub_download")
        file = f"hf_hub_download({arguments(repo, filename=name, revision=at)})"
    imports.append("from safetensors.torch import load_file")
    loads = [f"tables = load_file({file})"]
    for key in what.tables:
        encoder = ENCODERS[key]
        parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
        loads.append(f"pipe.load_textual_inversion(tables[{text(key)}], token={text(token or '...')}, {parts})")
    return loads


def _call(sampling: Sampling | None) -> list[str]:
    """Arguments of a stock pipeline's call that sample a distilled model as it was made to be."""
    if sampling is None:
        return []
    guidance: Mapping[str, float | None] = sampling.call or {"guidance_scale": sampling.guidance_scale}
    guided = [f"{name}={value}" for name, value in guidance.items() if value is not None]
    return [f"num_inference_steps={sampling.steps}", *guided]


def _pipeline(what: ArtefactKind, repo: str, at: str | None, prompt: str) -> str:
    load = f"pipe = DiffusionPipeline.from_pretrained({arguments(repo, revision=at)})"
    given = [text(prompt)] if what.takes_text else []
    if what.classes and what.pipeline == CONSISTENCY:  # its call takes the class, which the others do not
        given.append("class_labels=[0]")
    draw = f"image = pipe({', '.join([*given, *_call(what.sampling)])}).images[0]"
    if what.pipeline == SUPER_RESOLUTION and not what.takes_text:
        return _super_resolution(load, what.sampling)
    if what.pipeline in INPAINTING:
        head = "from diffusers import DiffusionPipeline\nfrom diffusers.utils import load_image\n"
        return "\n".join([head, load, *LOADED, f"image = pipe({text(prompt)}, {PAINTED}).images[0]"])
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


def _super_resolution(load: str, sampling: Sampling | None) -> str:
    factor = sampling.factor if sampling else None
    size = f"width={factor} * small.width, height={factor} * small.height" if factor else ""
    options = ", ".join(filter(None, ["image=small", "prompt_embeds=no_text", size, *_call(sampling)]))
    return f"""import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

{load}
no_text = torch.zeros(1, 1, pipe.unet.config.cross_attention_dim)
small = load_image("...")
image = pipe({options}).images[0]"""


def _control(kind: str, of_sdxl: bool, repo: str, at: str | None, base: str, base_at: str | None, prompt: str) -> str:
    part = CONTROLS[kind]
    pipeline = (
        "AutoPipelineForText2Image" if part == "controlnet" else f"StableDiffusion{'XL' * of_sdxl}AdapterPipeline"
    )
    followed = "image=followed"
    if kind in CONTROLS_OF_LATENTS:
        followed = "control_image=followed, width=followed.width, height=followed.height"
    return f"""from diffusers import {pipeline}, {kind}
from diffusers.utils import load_image

{part} = {kind}.from_pretrained({arguments(repo, revision=at)})
pipe = {pipeline}.from_pretrained({arguments(base, revision=base_at)}, {part}={part})
followed = load_image("condition.png")
image = pipe({text(prompt)}, {followed}).images[0]"""


def _autoencoder(repo: str, at: str | None, base: str, base_at: str | None, prompt: str) -> str:
    """In a pipeline of its base; without one, alone."""
    load = f"vae = {AUTOENCODER}.from_pretrained({arguments(repo, revision=at)})"
    if not base:
        return f"""from diffusers import {AUTOENCODER}
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image

{load}
pixels = VaeImageProcessor().preprocess(load_image("picture.png"))
latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
image = VaeImageProcessor().postprocess(vae.decode(latents / vae.config.scaling_factor).sample.detach())[0]"""
    return f"""from diffusers import {AUTOENCODER}, DiffusionPipeline

{load}
pipe = DiffusionPipeline.from_pretrained({arguments(base, revision=base_at)}, vae=vae)
image = pipe({text(prompt)}).images[0]"""


def _unclip(what: ArtefactKind, repo: str, at: str | None, base: str, base_at: str | None, prompt: str) -> str:
    """A prior or a decoder, with the other one, without which there is no picture."""
    own = arguments(base, revision=base_at) if what.adapter else arguments(repo, revision=at)
    loads = {name: f'{name} = DiffusionPipeline.from_pretrained("...")' for name in ("prior", "decoder")}
    name, part = ("prior", "prior") if what.of_prior else ("decoder", "unet")
    loads[name] = f"{name} = DiffusionPipeline.from_pretrained({own})"
    if what.adapter:
        weights = arguments(repo, prefix=part, weight_name=what.adapter, revision=at)
        loads[name] += f"\n{name}.{part}.load_lora_adapter({weights})"
    draw = f"image = decoder(**prior({text(prompt)})).images[0]"
    return "\n".join(["from diffusers import DiffusionPipeline", "", *loads.values(), draw])


def _clip(repo: str, at: str | None, prompt: str) -> str:
    where = arguments(repo, revision=at)
    return f"""from diffusers.utils import load_image
from transformers import {CLIP}, CLIPProcessor

clip = {CLIP}.from_pretrained({where})
processor = CLIPProcessor.from_pretrained({where})
texts = [{text(prompt)}, "something else"]
inputs = processor(text=texts, images=load_image("picture.png"), return_tensors="pt", padding=True)
shares = clip(**inputs).logits_per_image.softmax(1)"""


def _classifier(config: Mapping[str, Any], repo: str, at: str | None) -> str:
    name, size = config["_class_name"], config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"""import torch
from sdtune.noisy_classifier import {name}

classifier = {name}.from_pretrained({arguments(repo, revision=at)})
x_t = torch.randn(1, {config["in_channels"]}, {height}, {width})  # noised images
t = torch.tensor([500])  # their timesteps
p = classifier(x_t, t).softmax(dim=1)"""


def arguments(first: str, **more: str | None) -> str:
    return ", ".join([text(first), *(f"{name}={text(value)}" for name, value in more.items() if value)])


def text(value: str) -> str:
    """A Python literal."""
    return json.dumps(value, ensure_ascii=False)
