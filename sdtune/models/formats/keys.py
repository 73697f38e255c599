"""Builds modules from the keys and tensors of a file; shared by all formats."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats.neutral import Module

HADAMARD = {f"hada_{name}": f"loha.{name}" for name in "w1_a w1_b w2_a w2_b t1 t2".split()}
KRONECKER = {f"lokr_{name}": f"lokr.{name}" for name in "w1 w1_a w1_b w2 w2_a w2_b t2".split()}
LYCORIS = HADAMARD | KRONECKER
"""The end of a key to the kind and tensor that it holds; PEFT took these names over from LyCORIS."""

COMPLETE = [
    {"lora.down", "lora.up"},
    {"lora.down", "lora.mid", "lora.up"},
    {"loha.w1_a", "loha.w1_b", "loha.w2_a", "loha.w2_b"},
    {"loha.w1_a", "loha.w1_b", "loha.w2_a", "loha.w2_b", "loha.t1", "loha.t2"},
    *(
        one | two
        for one in ({"lokr.w1"}, {"lokr.w1_a", "lokr.w1_b"})
        for two in ({"lokr.w2"}, {"lokr.w2_a", "lokr.w2_b"}, {"lokr.w2_a", "lokr.w2_b", "lokr.t2"})
    ),
]
"""The sets of tensors that make up a module."""

FULL = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".reshape_weight")
"""Ends of keys of LyCORIS and ComfyUI for changes that are not low-rank."""
Place = tuple[str, str, str]
"""(part, module, slot); a slot is one of ``COMPLETE``, ``alpha``, or DoRA's ``magnitude`` or ``dora_scale``."""
EXTRA = {"alpha", "magnitude", "dora_scale"}
Scale = Callable[[str, str, int], tuple[float, int]]
"""(part, module, rank of the tensors) to (alpha, rank); a key ``alpha`` wins over it."""


def assemble(
    path: Path,
    tensors: Mapping[str, Tensor],
    place: Callable[[str], Place | None],
    scale: Scale = lambda part, name, rank: (rank or 1, rank or 1),
) -> dict[str, dict[str, Module]]:
    """The modules of a file; ``place`` says what each key holds.

    Raises:
        UserError: a key that ``place`` does not know, or a module with a tensor missing: a file is read completely
            or refused.
    """
    modules: dict[tuple[str, str], dict[str, Tensor]] = {}
    origin: dict[tuple[str, str], list[str]] = {}
    unknown: list[str] = []
    for key in sorted(tensors):
        if (where := place(key)) is None:
            unknown.append(key)
            continue
        part, name, slot = where
        own = modules.setdefault((part, name), {})
        if slot in own:
            raise UserError(f"{path}: {key} and another key name the same tensor")
        own[slot] = tensors[key]
        origin.setdefault((part, name), []).append(key)
    for at, own in modules.items():
        if not any(own.keys() - EXTRA == complete for complete in COMPLETE):
            unknown += origin[at]
    refuse_unknown(path, tensors, unknown)
    parts: dict[str, dict[str, Module]] = {}
    for (part, name), own in modules.items():
        try:
            parts.setdefault(part, {})[name] = module_of(own, lambda r, p=part, n=name: scale(p, n, r))
        except (ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{path}: the tensors or settings of {part} {name} do not match ({error})") from None
    return parts


def refuse_unknown(path: Path, tensors: Iterable[str], unknown: list[str]) -> None:
    """``UserError`` that counts the known keys and names the first unknown ones, if there are any."""
    total = len(list(tensors))
    if unknown:
        full = [key for key in unknown if key.endswith(FULL)]
        if full:
            raise UserError(
                f"{path}: {len(full)} of its {total} keys change norms, biases or complete weights, such as {full[0]}; "
                "sdtune reads low-rank changes of linear and convolution layers only"
            )
        raise UserError(
            f"{path}: {total - len(unknown)} of {total} keys make up an adapter; these do not: "
            f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        )


def module_of(own: dict[str, Tensor], scale: Callable[[int], tuple[float, int]]) -> Module:
    """A module from its tensors by slot.

    Raises:
        ValueError: shapes that do not match, an alpha of zero, numbers that are not finite.
    """
    extra = {slot: own[slot].float() for slot in own.keys() & EXTRA}
    kind = next(iter(own.keys() - EXTRA)).partition(".")[0]
    t = {slot.partition(".")[2]: tensor for slot, tensor in own.items() if slot not in EXTRA}
    if bad := [name for name, v in t.items() if v.ndim < 2 or not v.is_floating_point() or not v.numel()]:
        raise ValueError(f"{bad[0]} is not a matrix of numbers")
    if kind == "lora":
        t = without_core(t)
        rank = t["down"].shape[0]
        if t["up"].shape[1] != rank or any(k != 1 for k in t["up"].shape[2:]) or t["up"].ndim != t["down"].ndim:
            raise ValueError(f"up {tuple(t['up'].shape)}, down {tuple(t['down'].shape)}")
    else:
        rank = next((t[n].shape[0] for n in ("w2_b", "w1_b") if n in t), 0)
    alpha, own_rank = scale(rank)
    if rank:
        alpha = float(extra["alpha"]) if "alpha" in extra else alpha * rank / own_rank
    else:  # a LoKr of two full matrices has no rank: LyCORIS scales it by 1 whatever its alpha, PEFT by its config's
        rank = max(1, round(float(extra["alpha"]))) if "alpha" in extra else own_rank
        alpha = float(rank) if "alpha" in extra else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha:g}")
    norm = extra.get("dora_scale", extra.get("magnitude"))
    axis = int("dora_scale" in extra and norm is not None and norm.ndim > 1 and norm.shape[0] < norm.shape[1])
    module = Module(kind, t, alpha, rank, None if norm is None else norm.flatten(), axis)  # type: ignore[arg-type]
    rows = module.shape[axis]
    if norm is not None and (norm.numel() != rows and (axis == 0 or module.shape[1] % norm.numel())):
        raise ValueError(f"a magnitude of {norm.numel()} for {rows}")
    return module


def without_core(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of a convolution in three steps (1x1, kxk, 1x1) as one in two (kxk, 1x1), which is the same map."""
    if "mid" not in t:
        return t
    down = torch.einsum("ijkl,jp->ipkl", t["mid"].double(), t["down"].flatten(1).double())
    return {"down": down.to(t["down"].dtype), "up": t["up"]}


FOLDS = {"lora": ("up",), "loha": ("w1_a",), "lokr": ("w1", "w1_a")}
"""Kind to the tensors of which one takes a factor of the full change."""


def with_alpha(module: Module, alpha: float) -> Module:
    """The same change with another alpha; the tensor that takes the factor keeps its dtype."""
    if alpha == module.alpha:
        return module
    name = next(n for n in FOLDS[module.kind] if n in module.tensors)
    old = module.tensors[name]
    new = (old.double() * (module.alpha / alpha)).to(old.dtype)
    return replace(module, tensors=module.tensors | {name: new}, alpha=alpha)
