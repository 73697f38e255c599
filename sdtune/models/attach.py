"""Puts adapters onto models: those of any file format onto a pipeline, or as the start of adapters that train.

LoRA, and DoRA with norms of rows, become PEFT layers, as diffusers' own loader makes them. The change of any other kind
(LoHa, LoKr, DoRA with norms of columns) is added to the output of its layer. Every module of a file is used, or named
in an error.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from peft import LoraConfig
from peft.tuners.loha import LoHaLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sdtune.config.sections import UserError
from sdtune.models import formats
from sdtune.models.adapter_kinds import is_target
from sdtune.models.formats import PARTS, AdapterFile, Module

Key = tuple[str, str]
"""(part, published name of a module)."""


class Layers:
    """The linear and convolution layers of a pipeline, or of parts of one, by the names of published checkpoints."""

    def __init__(self, parts: Mapping[str, Any]):
        self.parts: dict[str, Any] = {part: parts[part] for part in PARTS if isinstance(parts.get(part), nn.Module)}
        found = {
            (part, published_name(part, name)): (name, layer)
            for part, model in self.parts.items()
            for name, layer in model.named_modules()
            if is_target(layer) and getattr(layer, "groups", 1) == 1
        }
        self.modules: dict[Key, nn.Module] = {key: layer for key, (_, layer) in found.items()}
        self.names = {key: name for key, (name, _) in found.items()}
        """The name of each layer inside its own model."""

    def check(self, asked: str, modules: Mapping[Key, Module], base: str = "the base") -> None:
        """Check that there is a layer of the right shape for every module.

        Args:
            asked: what an error begins with, such as ``--adapter FILE``.

        Raises:
            UserError: counts the modules with a layer, and names one without.
        """
        if missing := [key for key in modules if key not in self.modules]:
            raise UserError(
                f"{asked}: {len(modules) - len(missing)} of its {len(modules)} modules are layers of {base}; "
                f"it has no {'.'.join(missing[0])}"
            )
        for key, module in modules.items():
            shape, made = self.modules[key].weight.shape, torch.Size(module.shape)
            if made[0] != shape[0] or made.numel() != shape.numel():
                shapes = ("x".join(map(str, s)) for s in (shape, made))
                raise UserError(f"{asked}: {'.'.join(key)} is {' in the base, '.join(shapes)} in the adapter")

    def check_complete(self, asked: str, adapter: AdapterFile) -> None:
        """``UserError`` if the file's own settings name layers for which it has no module."""
        for part, targets in adapter.targets.items():
            ends = tuple(f".{target}" for target in targets)
            named = {n for p, n in self.modules if p == part and f".{n}".endswith(ends)}
            if part in adapter.parts and (missing := sorted(named - adapter.parts[part].keys())):
                raise UserError(
                    f"{asked}: {len(named) - len(missing)} of the {len(named)} modules that its settings name in "
                    f"{part} are in the file; it has no {missing[0]}, so it is damaged or was made for another base"
                )


def published_name(part: str, name: str) -> str:
    """The published name of a module; transformers 5.6 dropped the level ``text_model.`` from its own."""
    return f"text_model.{name.removeprefix('text_model.')}" if part.startswith("text_encoder") else name


def keyed(adapter: AdapterFile) -> dict[Key, Module]:
    return {(part, name): m for part, own in sorted(adapter.parts.items()) for name, m in sorted(own.items())}


def in_peft(module: Module) -> bool:
    """Whether it becomes a PEFT layer: LoRA, and DoRA with norms of rows."""
    return module.kind == "lora" and not module.axis and not module.base_norm


def attach(
    layers: Layers, name: str, adapter: AdapterFile, weight: float, asked: str
) -> tuple[list[str], list[RemovableHandle]]:
    """Put an adapter on its layers; returns the names of PEFT's adapters, whose weight is yet to be set, and the hooks.

    Raises:
        UserError: it does not match the layers, or lacks modules that its own settings name.
    """
    modules = keyed(adapter)
    layers.check(asked, modules)
    layers.check_complete(asked, adapter)
    names, hooks = [], []
    for part, model in layers.parts.items():
        for dora in (False, True):
            own = {
                n: m for (p, n), m in modules.items() if p == part and in_peft(m) and (m.magnitude is not None) is dora
            }
            if own:
                add_peft(model, f"{name}_dora" if dora else name, {layers.names[part, n]: m for n, m in own.items()})
                names.append(f"{name}_dora" if dora else name)
    for key, module in modules.items():
        if not in_peft(module):
            hooks.append(layers.modules[key].register_forward_hook(added(module, weight, layers.modules[key])))
    return list(dict.fromkeys(names)), hooks


@torch.no_grad()
def add_peft(model: Any, name: str, modules: Mapping[str, Module]) -> None:
    """PEFT layers with the weights of ``modules``, which go by the names in ``model`` and are all DoRA or none."""
    ranks = {f"^{re.escape(n)}": m.rank for n, m in modules.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules="|".join(f"(?:{re.escape(n)})" for n in modules),
        rank_pattern=ranks,
        use_dora=any(m.magnitude is not None for m in modules.values()),
        init_lora_weights=False,
    )
    with catch_warnings(action="ignore"):  # peft warns of a second adapter, which is intended
        model.add_adapter(config, name)
    wrapped = dict(model.named_modules())
    for where, module in modules.items():
        fill(wrapped[where], name, module)
        wrapped[where].lora_alpha[name], wrapped[where].scaling[name] = module.alpha, module.scale


def factors(layer: Any, name: str) -> dict[str, Tensor]:
    """The parameters of adapter ``name`` of a PEFT layer, as the tensors of a module are called; no magnitude."""
    if isinstance(layer, LoraLayer):
        return {"down": layer.lora_A[name].weight, "up": layer.lora_B[name].weight}
    own = {attribute: getattr(layer, attribute) for attribute in layer.adapter_layer_names}
    return {attribute.partition("_")[2]: held[name] for attribute, held in own.items() if name in held}


def fill(layer: Any, name: str, module: Module) -> None:
    """Copy the tensors of a module into a PEFT layer of its kind and rank."""
    for end, parameter in factors(layer, name).items():
        parameter.copy_(module.tensors[end].reshape(parameter.shape))
    if module.magnitude is not None:
        parameter = layer.lora_magnitude_vector[name].weight
        parameter.copy_(module.magnitude.reshape(parameter.shape))


def added(module: Module, weight: float, layer: nn.Module) -> Any:
    """A forward hook that adds ``weight`` times the change of a module to the output of its layer."""
    scaled = module.scaled(weight)
    change = scaled.delta(base=layer.weight.detach().cpu()).to(layer.weight)

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return output + functional.conv2d(inputs[0], change, None, layer.stride, layer.padding, layer.dilation)
        return output + functional.linear(inputs[0], change)

    return hook


@torch.no_grad()
def initialise(where: Path, parts: Mapping[str, nn.Module]) -> None:
    """Copy the adapter of a file of any format into the PEFT layers of ``parts``, which then have its effect.

    Where the file's scale (alpha / rank) differs from the layer's, the ratio goes into its second factor.

    Raises:
        UserError: another kind of adapter, other modules or ranks, or words that training cannot go on with.
    """
    asked = f"--init-adapter {where}"
    adapter = formats.read(where, "--init-adapter")
    if adapter.words:
        raise UserError(
            f"{asked}: also holds the words {', '.join(w.token for w in adapter.words)}, which it would lose; "
            "sdtune convert writes the adapter alone with --to diffusers"
        )
    layers = {
        (part, published_name(part, name)): layer
        for part, model in parts.items()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer | LycorisLayer)
    }
    modules, kind = keyed(adapter), kind_of(next(iter(layers.values())))
    wrong = [".".join(key) for key, module in modules.items() if key not in layers or not matches(layers[key], module)]
    if other := sorted({m.kind for m in modules.values() if m.kind != kind or (kind == "lora" and not in_peft(m))}):
        ways = [f"give --adapter {other[0]}"] if other != [kind] and len(other) == 1 else []
        if kind == "lora":
            ways.append("make a LoRA of it: sdtune merge --combine svd --rank R --model BASE")
        raise UserError(
            f"{asked}: holds {', '.join(other)}, with which a {CALLED[kind]} cannot begin; "
            f"{', or '.join(ways) or 'give a file of that kind'}"
        )
    if wrong or modules.keys() != layers.keys():
        missing = [".".join(key) for key in layers if key not in modules]
        raise UserError(
            f"{asked}: {len(modules) - len(wrong)} of the {len(layers)} modules that train are in it with their rank "
            f"and kind ({difference(wrong, missing)}); give it the options it was trained with"
        )
    for key, module in modules.items():
        fill(layers[key], "default", with_scale(module, layers[key].scaling["default"]))


CALLED = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


def kind_of(layer: Any) -> str:
    """The kind of a PEFT layer: ``lora``, ``loha`` or ``lokr``."""
    return "lora" if isinstance(layer, LoraLayer) else "loha" if isinstance(layer, LoHaLayer) else "lokr"


def matches(layer: Any, module: Module) -> bool:
    """Whether a PEFT layer holds a module's tensors as they are."""
    if isinstance(layer, LycorisLayer):
        shapes = {name: t.shape for name, t in factors(layer, "default").items()}
        return module.magnitude is None and shapes == {name: t.shape for name, t in module.tensors.items()}
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    dora = "default" in layer.lora_magnitude_vector
    return (
        in_peft(module)
        and dora is (module.magnitude is not None)
        and (
            (up.numel(), down.numel(), down.shape[0])
            == (module.tensors["up"].numel(), module.tensors["down"].numel(), module.rank)
        )
    )


def difference(wrong: Sequence[str], missing: Sequence[str]) -> str:
    kinds: Iterator[tuple[str, Sequence[str]]] = iter([("not these of it", wrong), ("it lacks", missing)])
    return "; ".join(f"{what}: {', '.join(names[:3])}" for what, names in kinds if names)


def with_scale(module: Module, scale: float) -> Module:
    return module if module.scale == scale else formats.with_alpha(module, scale * module.rank)
