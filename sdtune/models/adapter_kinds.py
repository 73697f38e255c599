"""The kinds of adapter that PEFT trains: LoRA, LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2024).

    LoRA  dW = (alpha / r) B A
    LoHa  dW = (alpha / r) (A1 B1) * (A2 B2)            elementwise: rank r^2 from two products of rank r
    LoKr  dW = (alpha / r) C (x) (A B)                  Kronecker product of a small matrix and a product of rank r

LoHa and LoKr are written in the layout of LyCORIS, ``hada_w1_a`` and ``lokr_w1``, which its users' tools read.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn

from sdtune.config.sections import Adapter, UserError
from sdtune.models import formats
from sdtune.models.formats import AdapterFile, Module, diffusers_file
from sdtune.models.formats.keys import assemble, with_alpha
from sdtune.models.formats.names import denoiser_of, dotted, underscored


def is_target(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def peft_config(cfg: Adapter, targets: str | list[str]) -> PeftConfig:
    """PEFT's config of the adapters that ``cfg`` asks for, on the modules that ``targets`` name."""
    alpha: Any = cfg.alpha or cfg.rank
    if cfg.adapter == "lora":
        return LoraConfig(
            r=cfg.rank,
            lora_alpha=alpha,
            lora_dropout=cfg.dropout,
            target_modules=targets,
            use_dora=cfg.use_dora,
            use_rslora=cfg.use_rslora,
            init_lora_weights=cfg.init_lora_weights,  # type: ignore[arg-type]
        )
    shared: dict[str, Any] = {
        "r": cfg.rank,
        "alpha": alpha,
        "rank_dropout": cfg.rank_dropout,
        "target_modules": targets,
    }
    if cfg.adapter == "loha":  # without cores for convolutions, whose gradient is wrong in PEFT 0.21
        return LoHaConfig(**shared)
    return LoKrConfig(
        decompose_both=cfg.decompose_both,
        decompose_factor=cfg.decompose_factor,
        use_effective_conv2d=cfg.use_effective_conv2d,
        **shared,
    )


# ---- starts that are a part of the base ----------------------------------------------------------------


def check_start(model: nn.Module, cfg: Adapter, targets: str | list[str]) -> None:
    """``UserError`` for a layer that PiSSA and OLoRA cannot split: a convolution, or one of a smaller rank."""
    asked = f"--init-lora-weights {cfg.init_lora_weights}"
    for name, layer in model.named_modules():
        if not (is_target(layer) and is_named(name, targets)):
            continue
        if isinstance(layer, nn.Conv2d):
            raise UserError(
                f"{asked}: {name} is a convolution, and it is for linear layers; leave it out, or the layer"
            )
        if isinstance(layer, nn.Linear) and cfg.rank > min(layer.weight.shape):
            sides = "x".join(map(str, layer.weight.shape))
            raise UserError(f"{asked}: --rank {cfg.rank} is more than {name} has, which is {sides}; give less")


@contextmanager
def drawn_alike(device: torch.device) -> Iterator[None]:
    """The same random numbers each time: a run that continues computes its start again, which no checkpoint holds."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def is_named(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT puts an adapter on the module ``name``."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def without_start(state: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of ``B A - B0 A0``, of twice the rank: the change of the base as it was before ``B0 A0`` was taken.

    PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) train ``(W - s B0 A0) + s B A``.

    Args:
        state: factors as they are now, by their names in PEFT; ``start`` as they began.
    """
    out = {}
    for name, now in state.items():
        if ".lora_A." in name:
            out[name] = torch.cat([now, start[name].to(now)])
        elif ".lora_B." in name:
            out[name] = torch.cat([now, -start[name].to(now)], dim=1)
        else:
            out[name] = now
    return out


# ---- LoHa and LoKr in files ----------------------------------------------------------------------------


def check_names(model: nn.Module, part: str) -> None:
    """``UserError`` for an adapted layer whose name would not come back from a file, where dots are underscores."""
    for name, layer in model.named_modules():
        if isinstance(layer, LycorisLayer):
            known = part.startswith("text_encoder") or denoiser_of(name) == part
            if not known or dotted(underscored(name)) != name:
                raise UserError(f"--target-modules: {name} has a name that the file of a LoHa or LoKr cannot hold")


def modules_of(part: str, model: Any, state: dict[str, Tensor]) -> dict[str, Module]:
    """The LoHa or LoKr modules of a model, from their tensors by PEFT's names.

    Their alpha is their rank, the factor multiplied into the first tensor: LyCORIS 4.1 scales twice when it merges.
    """
    config = model.peft_config["default"]
    tensors = {f"{part}.{name}": t.detach().cpu().contiguous() for name, t in state.items()}
    scale = float(config.alpha), int(config.r)
    found = assemble(Path(part), tensors, diffusers_file.place, lambda *_: scale)[part]
    return {name: with_alpha(module, module.rank) for name, module in found.items()}


def write_lycoris(path: Path, parts: dict[str, dict[str, Module]], metadata: dict[str, str]) -> None:
    """Write LoHa or LoKr modules in LyCORIS' layout, and make sure that they read back as they are."""
    formats.write(path, AdapterFile(parts, metadata), "kohya")
    want, got = AdapterFile(parts).modules(), formats.read(path).modules()
    wrong = sorted(want.keys() ^ got.keys()) or [name for name, m in want.items() if not same(m, got[name])]
    if wrong:
        raise RuntimeError(f"{path}: the adapter does not read back as it was trained: {wrong[:3]}")


def same(one: Module, other: Module) -> bool:
    """Whether two modules have equal factors, and scales that are equal in 32 bits."""
    return (
        one.kind == other.kind
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
        and abs(one.scale - other.scale) <= 1e-6 * one.scale
    )
