"""Folds adapters into the weights of a base, ``W' = W + sum_i dW_i``, and holds the base that they are compared with.

The output is a complete pipeline folder. It takes its name after two checks: the new weights give the image that the
base gives with the adapters loaded at run time, and every weight reads back as computed.

A DoRA scales its layer by ``g = m / ||W + s B A||`` (Liu et al. 2024, equation 5). With several adapters PEFT also
scales what earlier adapters have added to the layer, so the order of ``--adapter`` counts; here it does too.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.verbs import MergeConfig, SampleConfig
from sdtune.models import formats
from sdtune.models.attach import Key, Layers, attach, in_peft, published_name
from sdtune.models.formats import AdapterFile, Module
from sdtune.models.loading import load_pipeline
from sdtune.models.pipeline_folder import forget_machine

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EFFECT, PIXELS = 1e-2, 1e-4
"""Largest deviation of the image in [0, 1] in fp32: as a share of the adapters' effect, and from the order of sums."""
ROUNDED = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
"""Root mean square by which rounding the weights may change the image."""
SIDE = 256
"""Largest side of the image that is compared; the layers are the same at any size."""

Change = tuple[str, float, AdapterFile, dict[Key, Module]]
"""An adapter: its path or id, its weight, the file as read, and its modules with the weight in their scale."""


class Base(Layers):
    """The layers of a pipeline in fp32."""

    def __init__(self, pipe: DiffusionPipeline, where: str):
        super().__init__(pipe.components)
        self.pipe, self.where = pipe, where

    @cached_property
    def rest(self) -> dict[str, Tensor]:
        """Every other parameter: norms, biases, embeddings."""
        ours = {f"{part}.{name}.weight" for part, name in self.modules}
        named = {
            f"{part}.{published_name(part, name)}": tensor.detach()
            for part, model in self.parts.items()
            for name, tensor in model.named_parameters()
        }
        return {name: tensor for name, tensor in named.items() if name not in ours}

    def weight(self, key: Key) -> Tensor:
        return self.modules[key].weight.detach().cpu()

    def check_modules(self, where: str, modules: Mapping[Key, Module]) -> None:
        """``UserError`` unless the base has a layer of the right shape for every module."""
        self.check(f"--adapter {where}", modules, f"--model {self.where}")

    def check_loaded(self, file: Path, modules: Mapping[tuple[str, str], Module]) -> None:
        """Load an adapter file through diffusers and compare the change that it applies to each layer."""
        self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="adapter_0")
        seen = set()
        for part, module in self.parts.items():
            for name, layer in module.named_modules():
                if not hasattr(layer, "get_delta_weight"):
                    continue
                key = part, published_name(part, name)
                seen.add(key)
                got = layer.get_delta_weight("adapter_0").detach().double().cpu()
                if not formats.close(modules[key].delta(got.shape), got, 1e-5):
                    raise RunFailed(f"{file}: {'.'.join(key)} has another change in diffusers")
        if seen != modules.keys():
            raise RunFailed(f"{file}: diffusers adapts {len(seen)} of {len(modules)} layers")


def open_base(cfg: MergeConfig, model: str, flag: str = "--model") -> Base:
    """The pipeline of ``model`` in fp32; revision, variant and VAE of ``cfg`` are for ``--model`` alone."""
    own = {k: getattr(cfg, k) for k in ("revision", "variant", "vae")} if flag == "--model" else {}
    try:
        return Base(load_pipeline(SampleConfig(model=model, prompt=[""], cache_dir=cfg.cache_dir, **own)), model)
    except UserError as error:
        raise UserError(str(error).replace("--model", flag, 1)) from None


def changed(weight: Tensor, modules: Sequence[Module]) -> Tensor:
    """The weight with these changes in float64: first those that diffusers loads, in their order, then the others."""
    weight = weight.double()
    now = weight.clone()
    for module in sorted(modules, key=lambda m: not in_peft(m)):
        change = module.delta(base=weight)
        if module.magnitude is not None and in_peft(module):
            rows = list(range(1, weight.ndim))
            raw = weight + module.product(weight.shape)
            gain = (weight + change).square().sum(rows, keepdim=True) / raw.square().sum(rows, keepdim=True)
            change = change + (gain.sqrt() - 1) * (now - weight)
        now += change
    return now


def fold(cfg: MergeConfig, changes: Sequence[Change], provenance: Mapping[str, Any]) -> list[str]:
    """Write the pipeline of ``cfg.model`` with the adapters in its weights to ``cfg.output_dir``.

    Raises:
        UserError: an adapter that does not fit the base, or a folder that cannot be written.
        RunFailed: the folder does not do what base and adapters do; it is deleted.
    """
    out, dtype = cfg.output_dir, DTYPES[cfg.dtype]
    assert out is not None
    base = open_base(cfg, cfg.model)
    for where, _, _, modules in changes:
        base.check_modules(where, modules)
    layers = base.modules
    with torch.no_grad():
        for key, layer in layers.items():
            own = [modules[key] for _, _, _, modules in changes if key in modules]
            if own:
                layer.weight.copy_(changed(layer.weight.cpu(), own))
    summary, image = _same_image(cfg, changes, base.pipe)
    wanted = base.pipe.to("cpu", dtype)
    if broken := [n for part, m in base.parts.items() for n, p in m.named_parameters() if not bool(p.isfinite().all())]:
        raise UserError(f"--dtype {cfg.dtype}: {broken[0]} holds values out of its range")
    old = out.with_name(f".{out.name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with formats.staged(out) as new:
            shutil.rmtree(new, ignore_errors=True)
            wanted.save_pretrained(new)
            (new / "merge.json").write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            forget_machine(new)
            _verify(cfg, base, new, image)
            if out.exists():
                may_replace(out, cfg)
                out.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror or error})") from None
    return [f"{out}: {cfg.model} with {len(changes)} adapters in {cfg.dtype}; {summary}"]


def may_replace(out: Path, cfg: MergeConfig) -> None:
    """Check that a folder to be replaced is a pipeline, and not the base of the merge."""
    if any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise UserError(f"--output-dir {out}: holds something other than a pipeline; give another folder")
    if Path(cfg.model).exists() and out.samefile(cfg.model):
        raise UserError(f"--output-dir {out}: is the base itself; give another folder")


def _same_image(cfg: MergeConfig, changes: Sequence[Change], merged: DiffusionPipeline) -> tuple[str, np.ndarray]:
    """Compare the image of the new weights with that of the base with its adapters, both in fp32; returns a line."""
    image, pipe = draw(merged), open_base(cfg, cfg.model).pipe
    without = draw(pipe)
    with at_run_time(pipe, changes):
        wanted = draw(pipe)
    error, effect = rms(image - wanted), rms(without - wanted)
    if not error <= EFFECT * effect + PIXELS:
        raise RunFailed(
            f"{cfg.output_dir}: its image differs by {error:.2g}, while the adapters change it by {effect:.2g}; "
            "the folder was deleted"
        )
    return f"its image equals that of base and adapters to {error:.1e}, and they change it by {effect:.1e}", image


def _verify(cfg: MergeConfig, base: Base, folder: Path, image: np.ndarray) -> None:
    """Compare every weight of the folder with what was computed, and its image with the one in fp32."""
    merged = load_pipeline(SampleConfig(model=str(folder), prompt=[""]))
    for part, module in base.parts.items():
        state = merged.components[part].state_dict()
        wrong = [k for k, v in module.state_dict().items() if not torch.equal(v.to(state[k].dtype), state[k].cpu())]
        if wrong:
            raise RunFailed(
                f"{cfg.output_dir}: {part}.{wrong[0]} does not read back as computed; the folder was deleted"
            )
    if not rms(draw(merged) - image) <= ROUNDED[cfg.dtype]:
        raise RunFailed(f"{cfg.output_dir}: {cfg.dtype} changes its image too much; the folder was deleted")


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    """A seeded image in [0, 1] in two steps, in full fp32 (no TF32 on a GPU)."""
    side = min(int(np.max(pipe.unet.config.sample_size)) * pipe.vae_scale_factor, SIDE)
    noise = torch.Generator("cpu").manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        made = pipe("a photo", num_inference_steps=2, width=side, height=side, generator=noise, output_type="np")
    return made.images[0].astype(np.float64)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(difference**2)))


@contextmanager
def at_run_time(pipe: DiffusionPipeline, changes: Sequence[Change]) -> Iterator[None]:
    """Inside the block, the adapters are applied at run time, as `sdtune sample` does."""
    layers, names, weights, hooks = Layers(pipe.components), [], [], []
    for k, (where, weight, adapter, _) in enumerate(changes):
        own, added = attach(layers, f"adapter_{k}", adapter, weight, f"--adapter {where}")
        names += own
        weights += [weight] * len(own)
        hooks += added
    if names:
        pipe.set_adapters(names, weights)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
