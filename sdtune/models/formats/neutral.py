"""The common form of an adapter, which every file format is read into and written from.

A part is the denoiser, ``unet`` or ``transformer``, the ``prior`` of unCLIP, or a text encoder, ``text_encoder`` or
``text_encoder_2``. Modules go by the dotted names of the published diffusers and transformers checkpoints, those of
text encoders with their ``text_model.``.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

DENOISERS = ("unet", "transformer")
PARTS = (*DENOISERS, "prior", "text_encoder", "text_encoder_2")
Kind = Literal["lora", "loha", "lokr"]


@dataclass(frozen=True)
class Module:
    """The change of one linear or convolution weight, scaled by ``alpha / rank``.

    ``tensors`` by kind, all but ``down``/``up`` as in LyCORIS (Yeh et al. 2024):

    - ``lora``: ``down`` (r, in, *k), ``up`` (out, r, *1);
    - ``loha``: ``w1_a`` (out, r), ``w1_b`` (r, in * k * k), ``w2_a``, ``w2_b``; or, with cores ``t1``, ``t2``
      (r, r, k, k), ``w1_a`` (r, out) and ``w1_b`` (r, in);
    - ``lokr``: ``w1`` (a, b) or ``w1_a`` (a, r) and ``w1_b`` (r, b); ``w2`` (c, d, *k), or ``w2_a`` (c, r) and ``w2_b``
      (r, d * k * k), or with a core ``t2`` (r, r, k, k), ``w2_a`` (r, c) and ``w2_b`` (r, d).
    """

    kind: Kind
    tensors: dict[str, Tensor]
    alpha: float
    rank: int
    magnitude: Tensor | None = None
    """DoRA's learnt norm of each row (Liu et al. 2024), 1-D; with ``axis`` 1 of each column, as early LyCORIS has."""
    axis: int = 0
    base_norm: bool = False
    """DoRA divides by the norm of the base's rows, as ComfyUI does, and not by that of the changed weight's."""

    def scaled(self, weight: float) -> "Module":
        """With ``weight`` in its scale, where it is at run time: inside DoRA's norm."""
        return replace(self, alpha=self.alpha * weight)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: (out, in, *k), or (out, in * k * k) where the factors do not show the kernel's shape.

        Raises:
            ValueError, RuntimeError, IndexError: the factors do not match.
        """
        empty = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        return tuple(_product(self.kind, empty).shape)

    def product(self, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """``alpha / rank`` times the product of the factors in float64, without DoRA's magnitude.

        Of shape (out, in, *k); where the factors do not show the kernel, (out, in * k * k) unless ``shape`` is given.
        """
        product = _product(self.kind, {name: tensor.double() for name, tensor in self.tensors.items()}) * self.scale
        return product if shape is None else product.reshape(shape)

    def delta(self, shape: tuple[int, ...] | torch.Size | None = None, base: Tensor | None = None) -> Tensor:
        """The full change of the weight in float64; a DoRA module needs the weight that it changes, ``base``.

        Raises:
            ValueError: DoRA without ``base``, or factors that do not make up ``shape``.
        """
        product = self.product(base.shape if base is not None else shape)
        if self.magnitude is None:
            return product
        if base is None:
            raise ValueError("the change of a DoRA module depends on the weight it changes")
        changed = base.double() + product
        others = [d for d in range(changed.ndim) if d != self.axis]
        sizes = [-1 if d == self.axis else 1 for d in range(changed.ndim)]
        norm = (base.double() if self.base_norm else changed).square().sum(dim=others, keepdim=True).sqrt()
        return changed * (self.magnitude.double().reshape(sizes) / norm) - base.double()

    def norm(self) -> float:
        """Frobenius norm of the product; a LoRA's is computed from its factors."""
        if self.kind != "lora":
            return float(self.product().norm())
        up, down = (self.tensors[name].flatten(1).double() for name in ("up", "down"))
        return self.scale * math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values()) + (0 if self.magnitude is None else len(self.magnitude))


def _product(kind: Kind, t: dict[str, Tensor]) -> Tensor:
    match kind:
        case "lora":
            return (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(len(t["up"]), *t["down"].shape[1:])
        case "loha":
            return _pair(t, "1") * _pair(t, "2")
        case "lokr":
            one = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
            two = t["w2"] if "w2" in t else _pair(t, "2")
            return torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - 2)), two)


def _pair(t: dict[str, Tensor], side: str) -> Tensor:
    """``wN_a @ wN_b``, through the core ``tN`` where there is one."""
    a, b = t[f"w{side}_a"], t[f"w{side}_b"]
    if (core := t.get(f"t{side}")) is not None:
        return torch.einsum("ijkl,jq,ip->pqkl", core, b, a).contiguous()
    return a @ b


@dataclass(frozen=True)
class Embedding:
    """The learned vectors of one word."""

    token: str
    parts: dict[str, Tensor]
    """Text encoder to its vectors (n, dim)."""
    metadata: dict[str, str]
    format: str


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file, or to be written to one."""

    parts: dict[str, dict[str, Module]]
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of its file; the entry ``sdtune`` holds a run's record as JSON."""
    format: str = ""
    """Format it was read from."""
    words: tuple[Embedding, ...] = ()
    """Learned words that the file brings along."""
    targets: dict[str, list[str]] = field(default_factory=dict)
    """Part to the module names, or ends of them, that the file's own settings list."""

    def modules(self) -> dict[str, Module]:
        """Every module as ``part.name``, in a fixed order."""
        return {f"{part}.{name}": m for part, own in sorted(self.parts.items()) for name, m in sorted(own.items())}

    @property
    def kinds(self) -> list[str]:
        """Such as ``["lora", "dora"]``, the most frequent first."""
        names = [("dora" if m.magnitude is not None else m.kind) for m in self.modules().values()]
        return sorted(set(names), key=lambda k: (-names.count(k), k))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree to ``tolerance`` of the larger one's norm; never for what is not finite."""
    if a.shape != b.shape:
        return False
    size = max(float(a.norm()), float(b.norm()))
    return math.isfinite(size) and float((a - b).norm()) <= tolerance * size
