"""``sdtune convert``: an adapter in another format, verified before the file takes its name.

Every module of the new file is read again and its change compared. Where the base model is at hand both go into it
as well: the input as its changes added to the weights, the output through the reader that it is meant for (diffusers'
``load_lora_weights``, PEFT's ``from_pretrained``), and the same seeded input must give the same output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.verbs import ConvertConfig, SampleConfig
from sdtune.conversion.formats import AdapterFile, comfyui, embedding, metadata, read, staged, write
from sdtune.models.loading import load_pipeline

CHANGE, OUTPUT = 1e-2, 1e-5
"""Deviation that passes: of the size of what the adapter changes, and of the size of the output itself (rounding)."""


def convert(cfg: ConvertConfig) -> str:
    """Write ``cfg.output`` and return the line that says what was made and how it was checked."""
    if cfg.output.exists():
        raise UserError(f"{cfg.output}: exists; name another")
    if (cfg.to != "peft") != (cfg.output.suffix == ".safetensors"):
        raise UserError(f"{cfg.output}: {cfg.to} wants " + ("a folder" if cfg.to == "peft" else "a name.safetensors"))
    if not cfg.output.parent.is_dir():
        raise UserError(f"{cfg.output}: there is no folder {cfg.output.parent}")
    if found := embedding.read(cfg.input, cfg.token):
        with staged(cfg.output) as new:
            embedding.write(new, found, cfg.to)
            if not embedding.same(found, embedding.read(new)):
                raise RunFailed(f"{cfg.output}: does not read back as it was written; nothing is kept")
        return f"{cfg.output}: {cfg.to}, textual inversion {found.token}; checked: every vector reads back the same"
    adapter = read(cfg.input)
    pipe = base_model(cfg.model, adapter)
    with staged(cfg.output) as new:
        write(new, adapter, cfg.to)
        how = check(new, adapter, cfg.to, pipe)
    note = f"\nnote: {comfyui.NOTE_DORA}" if cfg.to == "comfyui" and "dora" in adapter.kinds else ""
    count = len(adapter.modules())
    return f"{cfg.output}: {cfg.to}, {'/'.join(adapter.kinds)} of {count} modules; checked: {how}{note}"


def base_model(name: str | None, adapter: AdapterFile) -> Any:
    """The pipeline to check in: ``name``, else the base of the metadata if it is on this machine, else None."""
    told, base = name, metadata.base_of(adapter)
    if told is None and base is not None:
        here = base == "tiny" or Path(base).exists()
        if here or (base.count("/") == 1 and isinstance(try_to_load_from_cache(base, "model_index.json"), str)):
            told = base
    if told is None:
        return None
    try:
        revision = None if name else metadata.provenance(adapter).get("revision")
        return load_pipeline(SampleConfig(model=told, revision=revision, prompt=["-"]))
    except UserError:
        if name:
            raise
        return None


def check(file: Path, adapter: AdapterFile, to: str, pipe: Any = None) -> str:
    """How ``file`` was found to hold ``adapter``, in words.

    Raises:
        RunFailed: it does not.
        UserError: the adapter does not fit ``pipe``.
    """
    again = read(file)
    worst = compare(adapter, again)
    told = f"the change of every module (largest deviation {worst:.1e})"
    if pipe is None:
        return f"{told}; no base model at hand, --model also checks the output"
    with merged(pipe, AdapterFile({})):
        plain = outputs(pipe)
    with merged(pipe, adapter):
        want = outputs(pipe)
    stock = to in ("peft", "diffusers") or adapter.kinds == ["lora"]
    reader, refusal = "PEFT" if to == "peft" else "diffusers", ""
    if stock:
        try:
            deviation = apart(plain, want, through_reader(pipe, file, adapter, to))
            if deviation <= 1:
                return f"{told}, and the model's output as {reader} reads it ({CHANGE * deviation:.1e} of the effect)"
            refusal = f"{reader} itself does not read all of it"
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            refusal = f"{reader} refuses it: {(str(error).strip() or type(error).__name__).splitlines()[0][:120]}"
        if to in ("diffusers", "peft"):
            raise RunFailed(f"{file.name.removeprefix('.')}: {refusal}; nothing is kept")
        unload(pipe)
    with merged(pipe, again):
        deviation = apart(plain, want, outputs(pipe))
    if deviation > 1:
        raise RunFailed(f"{file.name.removeprefix('.')}: gives another output than the input; nothing is kept")
    return f"{told}, and the model's output with it added to the weights{f' ({refusal})' * bool(refusal)}"


def compare(adapter: AdapterFile, again: AdapterFile) -> float:
    """The largest relative deviation of a module's change; ``RunFailed`` if one is more than rounding."""
    want, got = adapter.modules(), again.modules()
    if want.keys() != got.keys():
        odd = sorted(want.keys() ^ got.keys())
        raise RunFailed(f"{len(odd)} modules are in one file only, such as {odd[0]}; nothing is kept")
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
        if not deviation <= limit or not same_norm or module.axis != other.axis:
            raise RunFailed(f"{name}: changes by {deviation:.1e} of its size in the new file; nothing is kept")
        worst = max(worst, deviation)
    return worst


@contextmanager
def merged(pipe: Any, adapter: AdapterFile) -> Iterator[None]:
    """The changes of ``adapter`` added to the weights of ``pipe``, and taken back."""
    layers = {}
    for part, modules in adapter.parts.items():
        model = getattr(pipe, part, None)
        known = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        for name, module in modules.items():
            found = known.get(name) or known.get(name.removeprefix("text_model."))
            layers[f"{part}.{name}"] = (module, getattr(found, "weight", None))
    strange = [n for n, (m, weight) in layers.items() if weight is None or not fits(m.shape, weight.shape)]
    if strange:
        raise UserError(
            f"--model: {len(layers) - len(strange)} of {len(layers)} modules fit the base, not {', '.join(strange[:3])}"
        )
    old = {name: weight.detach().clone() for name, (_, weight) in layers.items()}
    try:
        with torch.no_grad():
            for module, weight in layers.values():
                weight.add_(module.delta(base=weight.detach().cpu()).to(weight))
        yield
    finally:
        with torch.no_grad():
            for name, (_, weight) in layers.items():
                weight.copy_(old[name])


def fits(made: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether a product goes onto a weight; one that does not tell the kernel has it in its columns."""
    return (
        made[0] == shape[0] and torch.Size(made).numel() == shape.numel() and (len(made) == 2 or made == tuple(shape))
    )


@torch.no_grad()
def outputs(pipe: Any) -> Tensor:
    """What the text encoders and the UNet make of a prompt and of seeded noise, in one vector."""
    told = pipe.encode_prompt(
        "a photo of a dog", device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    made = [t for t in told if isinstance(t, Tensor)]
    unet = pipe.unet
    side = min(64, unet.config.sample_size)
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    more = {}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        times = torch.full((1, 6), 8.0 * side, device=pipe.device, dtype=unet.dtype)
        more["added_cond_kwargs"] = {"text_embeds": told[2], "time_ids": times}
    predicted = unet(noise.to(pipe.device, unet.dtype), 500, encoder_hidden_states=told[0], **more).sample
    return torch.cat([t.flatten().double().cpu() for t in (*made, predicted)])


def apart(plain: Tensor, want: Tensor, got: Tensor) -> float:
    """Deviation in units of what passes."""
    allowed = CHANGE * float((want - plain).norm()) + OUTPUT * float(want.norm())
    deviation = float((got - want).norm())
    return deviation / allowed if deviation == deviation else float("inf")


def through_reader(pipe: Any, file: Path, adapter: AdapterFile, to: str) -> Tensor:
    """The outputs with ``file`` loaded by the library that it is meant for; ``pipe`` is left changed."""
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
