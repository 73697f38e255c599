"""The parts of a base model: read as ``model_index.json`` names them when first used, released, made into pipelines."""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses import FakeTensor

from sdtune.config.sections import UserError
from sdtune.data.cache import weights_digest
from sdtune.models.clip_skip import skip_layers
from sdtune.models.families import part_location
from sdtune.models.families.part_digest import identity_of, part_folder, remembered
from sdtune.models.families.vaes import fp32_vae
from sdtune.models.part_files import BROKEN, ConfigOnly, check_tokenizer, read_part, read_scheduler, reason

LIBRARIES = ("diffusers", "transformers")
"""Where classes of parts may come from; a ``model_index.json`` is somebody's file."""


LONGEST = 512
"""Tokens to which a saved tokenizer pads and cuts, if its model reads as many."""
HOST = torch.device("cpu")
"""Where the parts that train wait while others use the device."""


class ModelParts:
    """Parts load when first used: a run whose cache is full holds no VAE and no frozen text encoder.

    Those that train wait in the machine's memory until the recipe is moved to the device, so that they are not beside
    a text encoder or the VAE while images and captions are encoded.

    Args:
        cfg: a config with the section Model.
        source: folder or Hub id of the pipeline; ``index`` is its ``model_index.json``.
        dtype: of every part, but for a VAE that says that fp16 is too little for it (``force_upcast``); a recipe casts
            what it trains to fp32.
    """

    pipeline_class: ClassVar[Any]
    denoiser_name: ClassVar[str] = "transformer"
    """The part that predicts."""
    encoders: tuple[str, ...] = ("text_encoder",)
    """The text encoders, each with a tokenizer."""
    clip_layer: ClassVar[int | None] = None
    """Layer of CLIP that is read, counted from the last; of 1, another can be chosen. ``None``: none is."""

    def __init__(self, cfg: Any, source: str, index: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        self.cfg, self.source, self.index, self.device, self.dtype = cfg, source, index, device, dtype
        for part in (*self.encoders, *map(tokenizer_of, self.encoders), "vae", self.denoiser_name, "scheduler"):
            if not named(index, part) and not (part == "vae" and cfg.vae):
                way_out = "; give one with --vae" if part == "vae" else ""
                raise UserError(f"--model {cfg.model}: its model_index.json names no {part}{way_out}")
        self.parts: dict[str, Any] = {}
        self.retained: set[str] = {self.denoiser_name}
        self.downloaded: set[str] = set()

    @property
    def has_values(self) -> bool:
        """False where memory is estimated: the parts are shapes without values."""
        weight = next(self.denoiser.parameters())
        return weight.device.type != "meta" and not isinstance(weight, FakeTensor)

    def part_class(self, part: str) -> Any:
        """The class of a part, as ``model_index.json`` names it."""
        library, name = self.index[part] if named(self.index, part) else ("diffusers", "AutoencoderKL")
        kind = getattr(importlib.import_module(library), name, None) if library in LIBRARIES else None
        if not isinstance(kind, type):
            raise UserError(f"--model {self.cfg.model}: its {part} is a {library}.{name}, which is not known here")
        return self.reader(part, kind)

    @classmethod
    def reader(cls, part: str, kind: type) -> Any:
        """What reads a part, given the class that ``model_index.json`` names."""
        return kind

    def _place(self, part: str, source: str | None = None) -> tuple[str, str, dict[str, Any]]:
        """How an error names a part, its folder or repository, and where it is in that."""
        if source is None:
            return f"--model {self.cfg.model}: {part}", self.source, {"subfolder": part, "revision": self.cfg.revision}
        base = self.source if named(self.index, "vae") else None
        folder, subfolder = part_location(source, "--vae", "vae", base)
        return f"--vae {source}", folder, {"subfolder": subfolder} if subfolder else {}

    def _read(self, kind: Any, part: str, source: str | None = None, **more: Any) -> Any:
        """One part of the base from its folder or repository; the Hub is asked for it once."""
        asked, folder, where = self._place(part, source)
        settings = part.endswith("scheduler")  # one file for all classes
        what = asked if settings else f"{getattr(kind, '__name__', ConfigOnly.__name__)} {asked}"
        if what in self.downloaded:
            more["local_files_only"] = True
        read = read_scheduler if settings else read_part
        found = read(kind, folder, asked, cache_dir=self.cfg.cache_dir, **where, **more)
        self.downloaded.add(what)
        return found

    def _folder_of(self, part: str, source: str | None) -> tuple[Path | None, bool]:
        """Where a part lies on this machine, None if nowhere; and whether that is the Hub's cache."""
        _, folder, where = self._place(part, source)
        here = part_folder(folder, where.get("subfolder"), where.get("revision"), self.cfg.cache_dir)
        return here, not Path(folder).is_dir()

    def _read_module(self, kind: Any, part: str, source: str | None, **more: Any) -> Any:
        """A part with its weights; the Hub is not asked for one in its cache, so that a preview needs no network.

        The start of a run asked which commit is the newest, and what lies in the cache is of that one. Where some files
        of a part are missing, such as all but its settings, the Hub has them.
        """
        folder, cached = self._folder_of(part, source)
        if cached and folder and any(folder.glob("*.safetensors")):
            with suppress(UserError):
                return self._read(kind, part, source, local_files_only=True, **more)
        return self._read(kind, part, source, **more)

    def weights_key(self, part: str) -> str:
        """A digest of the weights of a frozen part, which is not read for it if its files have been seen before."""
        if part in self.parts:
            return weights_digest(self.parts[part])
        source, kind = self.cfg.vae if part == "vae" else None, self.part_class(part).__name__

        def identity() -> str | None:
            place, _ = self._folder_of(part, source)
            return identity_of(place, part, kind, self.dtype, self.cfg.variant, self.cfg.clip_skip)

        return remembered(identity, lambda: weights_digest(self.part(part)))

    def _meta_part(self, kind: Any, part: str, source: str | None) -> nn.Module:
        """A part without its weights: its configuration alone is read."""
        if self.index[part][0] == "transformers":
            config, make = self._read(kind.config_class, part), kind
        else:
            config, make = self._read(ConfigOnly(kind), part, source), kind.from_config
        with self.device:
            return make(config)

    def part(self, name: str) -> Any:
        """A part of the base in evaluation mode, frozen; on the meta device its shapes alone.

        It is on the run's device, but for one of ``retained``, which a recipe or a pipeline moves there.
        """
        if name not in self.parts:
            kind, dtype = self.part_class(name), self.dtype
            other = self.cfg.vae if name == "vae" else None
            if name == "vae" and dtype == torch.float16 and self.vae_config.get("force_upcast", True):
                kind, dtype = fp32_vae(kind), torch.float32
            if self.device.type == "meta":
                module = self._meta_part(kind, name, other).to(dtype)
            else:
                variant = {} if other else {"variant": self.cfg.variant}
                module = self._read_module(kind, name, other, dtype=dtype, **variant)
            if name == "text_encoder" and self.cfg.clip_skip:
                skip_layers(module, self.cfg.clip_skip, self.cfg.model)
            self.parts[name] = module.requires_grad_(False).eval()
            if name not in self.retained:
                move(module, self.device)
        return self.parts[name]

    @property
    def denoiser(self) -> Any:
        return self.part(self.denoiser_name)

    @property
    def vae(self) -> Any:
        return self.part("vae")

    @property
    def text_encoder(self) -> Any:
        return self.part(self.encoders[0])

    def retain(self, part: str) -> Any:
        """The part, which from now on holds trained weights and is never released."""
        self.retained.add(part)
        return self.part(part)

    def replace(self, part: str, module: nn.Module) -> None:
        """Put a module that trains in the place of a part."""
        self.parts[part] = module
        self.retained.add(part)

    def set_aside(self) -> None:
        """Drop the frozen parts, and have the others wait in the machine's memory: those before the first step."""
        for name in self.retained & self.parts.keys():
            move(self.parts[name], HOST)
        self.unload_frozen()

    @contextmanager
    def denoising_with(self, module: nn.Module) -> Iterator[None]:
        """Context in which ``predict`` asks another network, such as a teacher or a target."""
        before, self.parts[self.denoiser_name] = self.denoiser, module
        try:
            yield
        finally:
            self.parts[self.denoiser_name] = before

    def unload_frozen(self) -> None:
        """Drop the frozen parts that nothing trains; they are read again when next used."""
        self.parts = {name: module for name, module in self.parts.items() if name in self.retained}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def vae_key(self) -> str:
        """A digest of the VAE's weights."""
        return self.weights_key("vae")

    @cached_property
    def vae_config(self) -> Any:
        """The VAE's configuration, without its weights. Each step asks for it, so it is read once."""
        return self._read(ConfigOnly(self.part_class("vae")), "vae", self.cfg.vae)

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder, by its own name."""
        found = {name: self._read(self.part_class(name), name) for name in map(tokenizer_of, self.encoders)}
        for encoder in self.encoders:
            kind = self.part_class(encoder)
            if kind.__name__.startswith("CLIPText"):
                config = self._read(kind.config_class, encoder)
                check_tokenizer(found[tokenizer_of(encoder)], config, f"--model {self.cfg.model}")
        return found

    @property
    def tokenizer(self) -> Any:
        """That of the first text encoder."""
        return self.tokenizers[tokenizer_of(self.encoders[0])]

    def tokenizers_of(self, encoders: Iterable[str]) -> dict[str, Any]:
        """The tokenizer of each text encoder, by the encoder's name."""
        return {name: self.tokenizers[tokenizer_of(name)] for name in encoders}

    @cached_property
    def scheduler(self) -> Any:
        """The base's own, for sampling."""
        return self._read(self.part_class("scheduler"), "scheduler")

    def _new_scheduler(self) -> Any:
        """A scheduler of its own for each pipeline, since some keep a state."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def pipeline(self, kind: Any = None, **instead: Any) -> Any:
        """A stock pipeline of the parts as they are now.

        Args:
            kind: its class, if not the base's own.
            instead: parts in the place of the base's own, and further parts; None for none.
        """
        kind = kind or self.pipeline_class
        # The file of a tokenizer records how it was last called: it has to be the same whatever was cached
        for tokenizer in self.tokenizers.values():
            longest = min(tokenizer.model_max_length, LONGEST)
            tokenizer("", padding="max_length", max_length=longest, truncation=True)
        given = {name: value for name, value in self.index.items() if name[0] != "_" and not isinstance(value, list)}
        for name in (name for name, value in self.index.items() if isinstance(value, list)):
            if name in instead:
                given[name] = instead[name]
            elif name in ("scheduler", self.denoiser_name, "vae", *self.encoders):
                given[name] = self._new_scheduler() if name == "scheduler" else move(self.part(name), self.device)
            else:
                given[name] = self.tokenizers.get(name)
        accepted = inspect.signature(kind.__init__).parameters
        if "safety_checker" in self.index and "requires_safety_checker" in accepted:
            given["requires_safety_checker"] = False
        absent = {name for name, value in given.items() if value is None and name not in accepted}
        given |= instead
        try:
            return kind(**{name: value for name, value in given.items() if name not in absent})
        except BROKEN as error:  # settings of a damaged folder, of as many kinds as there are pipelines
            raise UserError(f"--model {self.cfg.model}: its parts make no {kind.__name__} ({reason(error)})") from error

    def fp32_pipeline(self, kind: Any = None, **instead: Any) -> Any:
        """The pipeline to be saved: frozen parts are read again in fp32, since half precision is for training only."""
        self.unload_frozen()
        training, self.dtype = self.dtype, torch.float32
        try:
            return self.pipeline(kind, **instead)
        finally:
            self.unload_frozen()
            self.dtype = training


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, on ``device``; one whose weights are shapes alone stays as it is."""
    here = next(module.parameters()).device.type
    return module if here in (device.type, "meta") else module.to(device)


def named(index: Mapping[str, Any], part: str) -> bool:
    """Whether a ``model_index.json`` names a class for ``part``."""
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")
