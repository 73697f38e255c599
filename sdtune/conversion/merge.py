"""``sdtune merge``: combines several adapters, changes the rank of one, or extracts one from two models.

With weights w_i the change of a layer is ``sum_i w_i (alpha_i / r_i) up_i down_i``. Written side by side,
``[w_1 s_1 up_1, w_2 s_2 up_2] [down_1; down_2]``, that sum is one product again, of rank r_1 + r_2, and exact. Every
other way truncates the singular value decomposition of the sum (`lowrank`), or of ``tuned - base``. The file is written
with alpha = rank, so that readers that know no alpha scale it rightly.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune import __version__
from sdtune.config.sections import RunFailed, UserError
from sdtune.config.verbs import MergeConfig
from sdtune.conversion.fold import DTYPES, Base, changed, fold, may_replace, open_base
from sdtune.conversion.lowrank import Spectrum, decompose, decompose_product
from sdtune.conversion.truncate import bar, extract, lora_module, truncate_all
from sdtune.models import formats
from sdtune.models.adapters import PORTABLE
from sdtune.models.formats import AdapterFile, Module, files, metadata, peft_folder
from sdtune.models.formats.tensor_file import load, locate, reproducible
from sdtune.models.loading import split_weight
from sdtune.run.public_name import public_name

ROUNDING = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
"""How far the product of two rounded factors may be from the exact one: a few units in the last place."""


@dataclass(frozen=True)
class Source:
    """An adapter and its weight; ``digest`` is the SHA-256 of its files."""

    where: str
    weight: float
    file: AdapterFile
    digest: str

    def modules(self) -> dict[tuple[str, str], Module]:
        """By (part, name), the weight multiplied into their scale as at run time, so inside DoRA's norm."""
        return {
            (part, name): module.scaled(self.weight)
            for part, modules in sorted(self.file.parts.items())
            for name, module in sorted(modules.items())
        }


def main(cfg: MergeConfig) -> str:
    return "\n".join(merge(cfg))


def merge(cfg: MergeConfig) -> list[str]:
    """Do what ``cfg`` asks for and return the lines to print.

    Raises:
        UserError: a file or model that is missing or does not match, or an output that exists; nothing is written.
    """
    target = cfg.output or cfg.output_dir
    assert target is not None, "the config makes sure"
    check_output(cfg, target)
    sources = [read_source(text) for text in cfg.adapter]
    if cfg.work == "fold":
        return fold(cfg, [(s.where, s.weight, s.file, s.modules()) for s in sources], provenance(cfg, sources))
    base = open_base(cfg, cfg.model) if cfg.model else None
    try:
        if cfg.work == "extract":
            assert base is not None
            result, lines = extract(cfg, base)
        elif cfg.work == "concat":
            result, lines = concatenate(sources, base), []
        else:
            result, lines = approximate(cfg, sources, base)
        if not result:
            raise UserError("there is nothing to write: no module changes")
        parts: dict[str, dict[str, Module]] = {}
        for (part, name), module in result.items():
            parts.setdefault(part, {})[name] = module
        adapter = AdapterFile(parts, {"sdtune": json.dumps(provenance(cfg, sources), sort_keys=True)}, "diffusers")
        write(target, adapter, cfg, base)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror or error})") from None
    ranks = sorted({module.rank for module in result.values()})
    size = target.stat().st_size / 1e6
    named = f"{len(result)} modules of rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))}"
    return [*lines, f"{target}: {named}, {size:.1f} MB, read back and compared"]


# ---- inputs ----------------------------------------------------------------------------------------------------


def read_source(text: str) -> Source:
    """The adapter that ``PATH_OR_ID[=WEIGHT]`` names."""
    where, weight = split_weight(text)
    adapter = formats.read(where, "--adapter")
    peft = files.peft_folders(Path(where)) if Path(where).is_dir() else {}
    read = [f / peft_folder.WEIGHTS for f in peft.values()] or [locate(where, option="--adapter")]
    if adapter.words:
        raise UserError(
            f"--adapter {where}: also holds the words {', '.join(w.token for w in adapter.words)}, which a merged file "
            "cannot hold; sdtune convert writes the adapter alone with --to diffusers"
        )
    if not adapter.modules():
        raise UserError(f"--adapter {where}: changes no layer")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in read)).hexdigest()
    return Source(where, weight, adapter, digest)


def provenance(cfg: MergeConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """A record of what was merged and how, without paths of this machine, so that it can be published."""
    records = [metadata.provenance(s.file) for s in sources]
    bases = {found for s in sources if (found := metadata.base_of(s.file))}
    base = cfg.model or (bases.pop() if len(bases) == 1 else "")
    how: dict[str, Any] = {"how": cfg.work, "rank": cfg.rank, "energy": cfg.energy, "dtype": cfg.dtype}
    if cfg.tuned:
        how["tuned"] = public_name(cfg.tuned)
    if sources:
        how["adapters"] = [{"name": public_name(s.where), "weight": s.weight, "sha256": s.digest} for s in sources]
    record = records[0] if cfg.work == "resize" else {}
    record |= {"version": __version__, "merged": {k: v for k, v in how.items() if v is not None}}
    if base:
        record["base"] = public_name(base)
    if triggers := dict.fromkeys(str(t["trigger"]) for t in records if t.get("trigger")):
        record["trigger"] = ", ".join(triggers)
    return record


# ---- adapters into one -----------------------------------------------------------------------------------------


def concatenate(sources: Sequence[Source], base: Base | None) -> dict[tuple[str, str], Module]:
    """The sum of all changes, exactly, the ranks of a module added up.

    Raises:
        UserError: a module other than LoRA, or modules of different shapes.
    """
    for source in sources:
        if other := [kind for kind in source.file.kinds if kind != "lora"]:
            raise UserError(
                f"--adapter {source.where}: {other[0]} is not a product of two factors, so ranks cannot be added up; "
                "approximate it with --combine svd --rank R --model BASE, or fold it into a model with --output-dir"
            )
        if base is not None:
            base.check_modules(source.where, source.modules())
    result = {}
    for key, modules in by_module(sources).items():
        shape = shape_of(key, modules, sources)
        result[key] = lora_module(*side_by_side(modules), shape)
    return result


def approximate(
    cfg: MergeConfig, sources: Sequence[Source], base: Base | None
) -> tuple[dict[tuple[str, str], Module], list[str]]:
    """The sum of all changes at a smaller rank, and lines that say how much of each part it retains.

    LoRA is decomposed from its factors; DoRA, LoHa and LoKr from their full change of the base's weight.
    """
    for source in sources:
        if base is None and (other := [kind for kind in source.file.kinds if kind != "lora"]):
            raise UserError(
                f"--adapter {source.where}: {other[0]} is approximated through its change of the base's weights: "
                "add --model BASE"
            )
        if base is not None:
            base.check_modules(source.where, source.modules())

    def spectra() -> Iterator[tuple[tuple[str, str], Spectrum, tuple[int, ...]]]:
        for key, modules in bar(by_module(sources).items(), "Decomposing"):
            shape = shape_of(key, modules, sources) if base is None else tuple(base.weight(key).shape)
            if all(m.kind == "lora" and m.magnitude is None for m in modules):
                yield key, decompose_product(*side_by_side(modules)), shape
            else:
                assert base is not None
                weight = base.weight(key).double()
                yield key, decompose(changed(weight, modules) - weight), shape

    return truncate_all(cfg, spectra())


def by_module(sources: Sequence[Source]) -> dict[tuple[str, str], list[Module]]:
    """(part, name) of every module that any source changes, to its changes in the order of the sources."""
    found: dict[tuple[str, str], list[Module]] = {}
    for source in sources:
        for key, module in source.modules().items():
            found.setdefault(key, []).append(module)
    return dict(sorted(found.items()))


def side_by_side(modules: Sequence[Module]) -> tuple[Tensor, Tensor]:
    """``up`` (out, r) and ``down`` (r, in * k * k) in float64, whose product is the sum of the LoRA modules."""
    up = torch.cat([m.scale * m.tensors["up"].double().flatten(1) for m in modules], dim=1)
    return up, torch.cat([m.tensors["down"].double().flatten(1) for m in modules])


def shape_of(key: tuple[str, str], modules: Sequence[Module], sources: Sequence[Source]) -> tuple[int, ...]:
    """The shape of the weight that these LoRA modules change.

    Raises:
        UserError: they change weights of different shapes, so their bases differ.
    """
    shapes = [(len(m.tensors["up"]), *m.tensors["down"].shape[1:]) for m in modules]
    if any(shape != shapes[0] for shape in shapes):
        owners = [s.where for s in sources if key in s.modules()]
        shown = ", ".join(f"{'x'.join(map(str, s))} in {o}" for s, o in zip(shapes, owners, strict=True))
        raise UserError(f"--adapter: {'.'.join(key)} is {shown}: adapters of different bases do not add up")
    return shapes[0]


# ---- output ----------------------------------------------------------------------------------------------------


def write(path: Path, adapter: AdapterFile, cfg: MergeConfig, base: Base | None) -> None:
    """Write the adapter in ``cfg.dtype``; it takes its name after it has been read back and compared.

    With a base, diffusers loads it too, and the change that it applies is compared.

    Raises:
        RunFailed: it does not read back as it was; the file is deleted.
    """
    dtype = DTYPES[cfg.dtype]
    rounded = {
        part: {name: replace(m, tensors={k: t.to(dtype) for k, t in m.tensors.items()}) for name, m in modules.items()}
        for part, modules in adapter.parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with formats.staged(path) as new:
        formats.write(new, replace(adapter, parts=rounded), "diffusers")
        tensors, about = load(new)
        about["lora_adapter_metadata"] = json.dumps(config_of(rounded), sort_keys=True)
        new.write_bytes(reproducible(tensors, about))
        wanted, got = adapter.modules(), formats.read(new).modules()
        if wanted.keys() != got.keys():
            raise RunFailed(f"{path}: not every module reads back: {sorted(wanted.keys() ^ got.keys())[:3]}")
        for name, module in wanted.items():
            if not formats.close(module.delta(), got[name].delta(), ROUNDING[cfg.dtype]):
                raise RunFailed(
                    f"{path}: {name} does not read back as it was; it may be out of the range of {cfg.dtype}"
                )
        if base is not None:
            base.check_loaded(new, {(part, n): m for part, ms in rounded.items() for n, m in ms.items()})


def config_of(parts: Mapping[str, dict[str, Module]]) -> dict[str, Any]:
    """Rank and alpha of every module, in the form that diffusers reads from a file's metadata.

    Without it, diffusers before 0.42 would give every module the alpha of the first one.
    """
    config = {}
    for part, modules in parts.items():
        own, _ = peft_folder.config(part, modules, None)
        config |= {f"{part}.{k}": own[k] for k in PORTABLE if own.get(k) not in (None, {}, False, "none")}
    return config


def check_output(cfg: MergeConfig, target: Path) -> None:
    """Check, before any work, that the output does not exist or may be replaced."""
    flag = "--output" if cfg.output else "--output-dir"
    if not target.exists():
        return
    if target.is_dir() != (cfg.output is None):
        raise UserError(f"{flag} {target}: is {'a folder' if target.is_dir() else 'a file'}; give another name")
    if not cfg.overwrite and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{flag} {target}: exists already; give another name or add --overwrite")
    if target.is_dir():
        may_replace(target, cfg)
