"""What makes a run fit into memory: the largest batch, and the options that save enough, each one estimated."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import torch

from sdtune.config import parsing
from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import RunFailed, UserError
from sdtune.config.untrusted import echo
from sdtune.recipes.recipe import Recipe, RecipeDataset, TrainingConfig
from sdtune.run.device import best_device
from sdtune.training.memory_estimate import MemoryEstimate, estimate, meta_recipe, trial_step

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of ``8GB``, ``8GiB`` or ``8e9``. Raises: UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] not in UNITS or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise UserError(f"--memory {text}: wants a size, such as 8GB or 7.5GiB")
    return size


def human_bytes(size: float) -> str:
    """Bytes in GB or MB, as text."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def limit_of(text: str | None, device: torch.device) -> int:
    """Bytes that a process may use: as asked, or all that its device has free."""
    if text is not None:
        return parse_size(text)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Estimates:
    """Estimates of a run under changes of its options; each is computed once.

    Args:
        world: processes of the run.
        made: what `meta_recipe` gave for ``cfg``, which the estimate without changes uses up.
    """

    def __init__(
        self,
        kind: type[Recipe],
        cfg: TrainingConfig,
        device: torch.device,
        world: int,
        made: tuple[Recipe, RecipeDataset] | None = None,
    ):
        self.kind, self.cfg, self.device, self.world, self.made = kind, cfg, device, world, made
        self.base: int | None = None
        self.known: dict[str, MemoryEstimate] = {}

    @property
    def share(self) -> int:
        """Images of a step that each process sees."""
        return self.cfg.train_batch_size * self.cfg.gradient_accumulation_steps

    def of(self, **changed: Any) -> MemoryEstimate:
        """The need under some changes. Raises: UserError, RuntimeError, as `memory.estimate` does."""
        key = repr(sorted(changed.items()))
        if key not in self.known:
            made = None if changed else self.made
            if made is None:
                cfg = self.cfg.model_copy(update=changed)
                made = meta_recipe(self.kind, cfg, self.share * self.world, lambda line: None)
            self.known[key] = estimate(*made, self.device, self.base)
            self.base = self.known[key].base
        return self.known[key]

    def attempt(self, changed: dict[str, Any]) -> MemoryEstimate | None:
        """As `of`; ``None`` where an option needs a library or a device that is not here."""
        try:
            return self.of(**changed)
        except UserError:
            return None

    def batches(self) -> Iterator[dict[str, int]]:
        """Ways to cut the images of a step, the largest batch first."""
        for size in range(self.share, 0, -1):
            if self.share % size == 0:
                yield {"train_batch_size": size, "gradient_accumulation_steps": self.share // size}

    def fitting_batch(self, limit: int) -> dict[str, int] | None:
        """The largest batch that fits and is smaller than the run's own."""
        smaller = (cut for cut in self.batches() if cut["train_batch_size"] < self.cfg.train_batch_size)
        return next((cut for cut in smaller if (need := self.attempt(cut)) and need.total <= limit), None)


def savings(cfg: TrainingConfig) -> Iterator[dict[str, Any]]:
    """Changes of options that save memory, those first that change least of what is learnt."""
    if not cfg.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if isinstance(cfg, LoraConfig) or (isinstance(cfg, DreamBoothConfig) and cfg.lora):
        yield from ({"quantize_base": bits} for bits in cfg.quantizations if not cfg.quantize_base)
    if cfg.optimizer == "adamw" and not cfg.use_8bit_adam:
        yield {"use_8bit_adam": True}
    if cfg.mixed_precision in (None, "no"):
        yield {"mixed_precision": "bf16"}
    if cfg.use_ema:
        yield {"use_ema": False}


def flags(changed: dict[str, Any]) -> str:
    """Options as they are given on the command line."""
    return shlex.join(word for name, value in changed.items() for word in parsing.flag_words(name, value))


def fitting_changes(estimates: Estimates, limit: int) -> list[tuple[dict[str, Any], MemoryEstimate]]:
    """The changes each of which makes a run fit; where none is enough alone, as many together as are needed.

    Where nothing makes it fit, the one change that is returned does not either.
    """
    cfg, smaller = estimates.cfg, estimates.fitting_batch(limit)
    alone = [*([smaller] if smaller else []), *savings(cfg)]
    fits = [(changed, need) for changed in alone if (need := estimates.attempt(changed)) and need.total <= limit]
    if fits:
        return fits
    together: dict[str, Any] = {}
    best = estimates.of()
    for changed in (*savings(cfg), {"train_batch_size": 1, "gradient_accumulation_steps": estimates.share}):
        need = estimates.attempt(together | changed)
        if need and need.total < best.total:
            together, best = together | changed, need
        if best.total <= limit:
            break
    return [(together, best)]


def largest_batch(kind: type[Recipe], cfg: TrainingConfig, world: int, memory: str | None) -> TrainingConfig:
    """The config with the images of a step cut into the largest batches that fit; what is learnt stays the same.

    On a GPU a batch that should fit is tried, and the next smaller one if it does not.

    For several processes the search is in a process of its own, so that no GPU keeps anything of it.

    Raises:
        UserError: not even a batch of one image fits.
    """
    if world == 1:
        return cfg.model_copy(update=largest_cut(kind, cfg, world, memory))
    return cfg.model_copy(update=in_a_fork(lambda: largest_cut(kind, cfg, world, memory)))


def in_a_fork(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What ``work()`` returns, or raises, when a fork of this process does it.

    Raises:
        RunFailed: the fork died.
    """
    context = get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def send() -> None:
        try:
            sending.send(work())
        except (UserError, RunFailed) as error:
            sending.send(error)

    child = context.Process(target=send)
    child.start()
    sending.close()
    try:
        found = receiving.recv()
    except EOFError:
        child.join()
        raise RunFailed(f"--find-batch-size: the search ended with exit code {child.exitcode}") from None
    child.join()
    if isinstance(found, Exception):
        raise found
    cut: dict[str, int] = found
    return cut


def largest_cut(kind: type[Recipe], cfg: TrainingConfig, world: int, memory: str | None) -> dict[str, int]:
    """The options of `largest_batch`. Raises: UserError, as that does."""
    device = best_device(mps=False)
    limit = limit_of(memory, device)
    estimates = Estimates(kind, cfg, device, world)
    try:
        for cut in estimates.batches():
            chosen, need = cfg.model_copy(update=cut), estimates.of(**cut)
            fits = need.total <= limit
            if fits and device.type == "cuda":
                fits = really_fits(kind, chosen, device, estimates.share * world, limit)
            if fits:
                size, times = cut.values()
                echo(
                    f"--find-batch-size: --train-batch-size {size} --gradient-accumulation-steps {times}, "
                    f"{human_bytes(need.total)} of {human_bytes(limit)} (estimate)"
                )
                return cut
    except RuntimeError as error:
        raise RunFailed(f"--find-batch-size: this recipe cannot be traced ({str(error).splitlines()[0]})") from error
    raise UserError(
        f"--find-batch-size: a batch of one image needs {human_bytes(need.total)}, and {human_bytes(limit)} are there; "
        "`sdtune check`, with the same options, says what makes it fit"
    )


def really_fits(kind: type[Recipe], cfg: TrainingConfig, device: torch.device, group: int, limit: int) -> bool:
    """Whether a real step on a GPU stays within ``limit`` bytes."""
    try:
        fits = trial_step(kind, cfg, device, group) <= limit
    except torch.OutOfMemoryError:
        fits = False
    torch.cuda.empty_cache()  # once the error, and what it holds, is gone
    return fits
