"""``sdtune convert``: writes an adapter in another format and checks it before the file takes its name.

The new file is read back, and the change of every module is compared with that of the input. Where the base model is at
hand, both are also applied to it: the input by adding its changes to the weights, the output through the library that
reads the format (diffusers' ``load_lora_weights``, PEFT's ``from_pretrained``). Both must give the same output for the
same seeded input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.verbs import ConvertConfig, SampleConfig
from sdtune.models import families
from sdtune.models.attach import Key, Layers, keyed
from sdtune.models.formats import AdapterFile, Module, comfyui, embedding, kohya, metadata, read, staged, write
from sdtune.models.formats.files import HOLD_WORDS
from sdtune.models.loading import load_pipeline

CHANGE, OUTPUT = 1e-2, 1e-5
"""Largest deviation allowed: as a share of the adapter's effect, and of the output's own norm (rounding)."""


def convert(cfg: ConvertConfig) -> str:
    """Write ``cfg.output`` and return a line that says what was written and how it was checked.

    Raises:
        UserError: an output that exists or has the wrong kind of name, or an input that cannot be read.
        RunFailed: the new file does not hold the same adapter; it is deleted.
    """
    if cfg.output.exists():
        raise UserError(f"{cfg.output}: exists already; give another name")
    if (cfg.to != "peft") != (cfg.output.suffix == ".safetensors"):
        raise UserError(
            f"{cfg.output}: the output of --to {cfg.to} is "
            + ("a folder" if cfg.to == "peft" else "a .safetensors file")
        )
    if not cfg.output.parent.is_dir():
        raise UserError(f"{cfg.output}: there is no folder {cfg.output.parent}")
    if found := embedding.read(cfg.input, cfg.token):
        with staged(cfg.output) as new:
            embedding.write(new, found, cfg.to)
            if not embedding.same(found, embedding.read(new)):
                raise RunFailed(f"{cfg.output}: does not read back as it was written; the file was deleted")
        return f"{cfg.output}: {cfg.to}, textual inversion {found.token}; checked: all vectors read back equal"
    adapter = read(cfg.input)
    pipe = base_model(cfg.model, adapter)
    if pipe is not None:
        Layers(pipe.components).check_complete(str(cfg.input), adapter)
    if cfg.to == "comfyui" and cfg.model:
        adapter = for_comfyui(adapter, Layers(pipe.components))
    with staged(cfg.output) as new:
        write(new, adapter, cfg.to)
        how = check(new, adapter, cfg.to, pipe)
    notes = "".join(f"\nnote: {note}" for note in notes_of(adapter, cfg.to))
    count = len(adapter.modules())
    return f"{cfg.output}: {cfg.to}, {'/'.join(adapter.kinds)} of {count} modules; checked: {how}{notes}"


def notes_of(adapter: AdapterFile, to: str) -> list[str]:
    """What readers of the format ``to`` do not do with this adapter, a sentence each."""
    modules, notes = adapter.modules(), []
    rows = [m for m in modules.values() if m.magnitude is not None and not m.axis]
    if to == "comfyui" and any(m.base_norm for m in rows):
        notes.append("the file is for ComfyUI alone: its DoRA is exact there, and wrong in A1111, Forge and diffusers")
    elif to == "comfyui" and rows:
        notes.append(comfyui.NOTE_DORA)
    if to == "kohya":
        missed = ["DoRA's magnitudes"] if any(m.magnitude is not None for m in modules.values()) else []
        missed += sorted({name.split(".")[1] for name in modules if name.split(".")[1] in kohya.UNREAD})
        if missed:
            notes.append(
                f"sd-scripts' own reader ignores {', '.join(missed)}, which this file has; A1111, Forge and ComfyUI "
                "read them"
            )
    if adapter.words and to not in HOLD_WORDS:
        names = ", ".join(word.token for word in adapter.words)
        notes.append(f"{to} has no place for the words {names}, which the input brings along: they are left out")
    return notes


def for_comfyui(adapter: AdapterFile, layers: Layers) -> AdapterFile:
    """The adapter with DoRA's norms of rows as ComfyUI needs them to be exact: times ``||W|| / ||W + s B A||``.

    ComfyUI divides them by the norm of the base's row, where the paper divides by that of the changed row.
    """
    layers.check("--model", keyed(adapter))

    def exact(key: Key, module: Module) -> Module:
        if module.magnitude is None or module.axis or module.base_norm:
            return module
        weight = layers.modules[key].weight.detach().cpu().double()
        changed = weight + module.product(weight.shape)
        ratio = weight.flatten(1).norm(dim=1) / changed.flatten(1).norm(dim=1)
        return replace(module, magnitude=(module.magnitude.double() * ratio).float(), base_norm=True)

    parts = {part: {n: exact((part, n), m) for n, m in own.items()} for part, own in adapter.parts.items()}
    return replace(adapter, parts=parts)


def base_model(name: str | None, adapter: AdapterFile) -> Any:
    """The pipeline to check in: ``name``; else the base that the metadata names if it is on this machine; else None."""
    chosen, base = name, metadata.base_of(adapter)
    if chosen is None and base is not None:
        here = base in families.BUILT_IN or Path(base).exists()
        if here or (base.count("/") == 1 and isinstance(try_to_load_from_cache(base, "model_index.json"), str)):
            chosen = base
    if chosen is None:
        return None
    try:
        revision = None if name else metadata.provenance(adapter).get("revision")
        return load_pipeline(SampleConfig(model=chosen, revision=revision, prompt=["-"]))
    except UserError:
        if name:
            raise
        return None


def check(file: Path, adapter: AdapterFile, to: str, pipe: Any = None) -> str:
    """Check that ``file`` holds ``adapter``; returns a sentence on how it was checked.

    Raises:
        RunFailed: it does not.
        UserError: the adapter does not fit ``pipe``.
    """
    written = read(file)
    worst = compare(adapter, written)
    checked = f"the change of every module (largest deviation {worst:.1e})"
    if pipe is None:
        return f"{checked}; no base model at hand: give --model to check the output too"
    with merged(pipe, AdapterFile({})):
        without = outputs(pipe)
    with merged(pipe, adapter):
        want = outputs(pipe)
    stock = to in ("peft", "diffusers") or (adapter.kinds == ["lora"] and not adapter.words)
    reader, refusal = "PEFT" if to == "peft" else "diffusers", ""
    if stock:
        try:
            deviation = deviation_of(without, want, through_reader(pipe, file, adapter, to))
            if deviation <= 1:
                return (
                    f"{checked}, and the model's output as {reader} reads it ({CHANGE * deviation:.1e} of the effect)"
                )
            refusal = f"{reader} itself does not read all of it"
        except (ValueError, RuntimeError, KeyError, AttributeError, AssertionError) as error:  # by its own checks
            refusal = f"{reader} refuses it: {(str(error).strip() or type(error).__name__).splitlines()[0][:120]}"
        if to in ("diffusers", "peft"):
            raise RunFailed(f"{file.name.removeprefix('.')}: {refusal}; the new file was deleted")
        unload(pipe)
    with merged(pipe, written):
        deviation = deviation_of(without, want, outputs(pipe))
    if deviation > 1:
        raise RunFailed(f"{file.name.removeprefix('.')}: gives another output than the input; it was deleted")
    return f"{checked}, and the model's output with it added to the weights{f' ({refusal})' * bool(refusal)}"


def compare(adapter: AdapterFile, written: AdapterFile) -> float:
    """The largest relative deviation of a module's change; ``RunFailed`` if one is more than rounding."""
    want, got = adapter.modules(), written.modules()
    if want.keys() != got.keys():
        unpaired = sorted(want.keys() ^ got.keys())
        raise RunFailed(
            f"{len(unpaired)} modules are in one file only, such as {unpaired[0]}; the new file was deleted"
        )
    if [w.token for w in adapter.words] != [w.token for w in written.words] and written.format in HOLD_WORDS:
        raise RunFailed("its words do not read back as they were; the new file was deleted")
    worst = 0.0
    for name, module in want.items():
        other = got[name]
        norms = [m.magnitude for m in (module, other)]
        same_norm = all(n is None for n in norms) or (
            None not in [type(n) if n is None else n.shape for n in norms] and torch.equal(norms[0], norms[1])  # type: ignore[arg-type]
        )
        one, two = module.product(), other.product()
        size = float(one.norm())
        deviation = float((one - two).norm()) / size if size else float(two.norm())
        # a factor that goes into fp16 or bf16 weights rounds each of them once
        limit = max(1e-6, max(torch.finfo(t.dtype).eps for t in module.tensors.values()))
        same_norm = same_norm and (module.axis, module.base_norm) == (other.axis, other.base_norm)
        if not deviation <= limit or not same_norm:
            raise RunFailed(f"{name}: changes by {deviation:.1e} of its size in the new file, which was deleted")
        worst = max(worst, deviation)
    return worst


@contextmanager
def merged(pipe: Any, adapter: AdapterFile) -> Iterator[None]:
    """Inside the block, ``pipe`` has the changes of ``adapter`` added to its weights."""
    layers, modules = Layers(pipe.components), keyed(adapter)
    layers.check("--model", modules)
    weights = {key: layers.modules[key].weight for key in modules}
    old = {key: weight.detach().clone() for key, weight in weights.items()}
    try:
        with torch.no_grad():
            for key, module in modules.items():
                weights[key].add_(module.delta(base=weights[key].detach().cpu()).to(weights[key]))
        yield
    finally:
        with torch.no_grad():
            for key, weight in weights.items():
                weight.copy_(old[key])


@torch.no_grad()
def outputs(pipe: Any) -> Tensor:
    """The outputs of text encoders and UNet for a fixed prompt and seeded noise, as one float64 vector.

    Of a pipeline without a UNet the latents of a step, which depend on all parts.
    """
    if not hasattr(pipe, "unet"):
        side = 8 * pipe.vae_scale_factor
        pipe.set_progress_bar_config(disable=True)
        options = families.family_class(type(pipe).__name__).guidance(1.0, "")
        options |= {"height": side, "width": side, "num_inference_steps": 1, "output_type": "latent"}
        noise = torch.Generator().manual_seed(0)
        latents = pipe(prompt="a photo of a dog", generator=noise, **options).images
        return torch.as_tensor(latents).flatten().double().cpu()
    encoded = pipe.encode_prompt(
        "a photo of a dog", device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    made = [t for t in encoded if isinstance(t, Tensor)]
    unet = pipe.unet
    side = min(64, unet.config.sample_size)
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    more = {}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        time_dim = unet.config.projection_class_embeddings_input_dim - encoded[2].shape[-1]
        sizes = (1, time_dim // unet.config.addition_time_embed_dim)
        times = torch.full(sizes, 8.0 * side, device=pipe.device, dtype=unet.dtype)
        more["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": times}
    predicted = unet(noise.to(pipe.device, unet.dtype), 500, encoder_hidden_states=encoded[0], **more).sample
    return torch.cat([t.flatten().double().cpu() for t in (*made, predicted)])


def deviation_of(without: Tensor, want: Tensor, got: Tensor) -> float:
    """Deviation of ``got`` from ``want`` divided by the largest one allowed; ``without`` is the base's own output."""
    allowed = CHANGE * float((want - without).norm()) + OUTPUT * float(want.norm())
    deviation = float((got - want).norm())
    return deviation / allowed if deviation == deviation else float("inf")


def through_reader(pipe: Any, file: Path, adapter: AdapterFile, to: str) -> Tensor:
    """The outputs with ``file`` loaded by the library that reads its format; it stays loaded in ``pipe``."""
    with catch_warnings(action="ignore"):
        if to == "peft":
            from peft import PeftModel

            for part in adapter.parts:  # it puts its layers into the model itself
                PeftModel.from_pretrained(getattr(pipe, part), str(file), subfolder=part)
        else:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return outputs(pipe)


def unload(pipe: Any) -> None:
    free: Callable[[], None] = pipe.unload_lora_weights
    free()
