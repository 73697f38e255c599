"""How much memory a training step needs, found without running it: shapes are traced, and no weight is read.

The recipe is built on the meta device, so that only configurations are read, and becomes fake tensors of the run's
own device (``torch._subclasses.fake_tensor``): each operation then tells the shapes that it would give, for that
device's kernels, and allocates nothing. A dispatch mode counts the bytes of every storage from the moment it is made to
the moment autograd or Python frees it, and remembers the largest sum.

Of a sample grid it counts the parts that are read for it and what the VAE needs to decode an image. It leaves out what
an allocator loses to rounding, the scratch space of kernels, and what else happens outside of steps (filling the cache,
denoising samples, checkpoints).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate

from sdtune.config.sections import Adapter, Captions
from sdtune.models.quantize import require, sizes
from sdtune.recipes.finetune import FineTune
from sdtune.recipes.recipe import Recipe, RecipeDataset, TrainingConfig
from sdtune.training import optim, optimizer_state
from sdtune.training.engine import Engine
from sdtune.training.peak_memory import PeakMemoryMode
from sdtune.training.prepare import prepare_modules
from sdtune.training.preview_memory import empty_modules, of_preview, parts_of_preview, size_of


class MemoryEstimate(NamedTuple):
    """Bytes in use when a step needs most, by what they hold."""

    base: int
    """The process without a model: libraries, the tables of the dataset. None of it is on a GPU."""
    weights: int
    optimizer: int
    average: int
    gradients: int
    activations: int
    """What the forward pass keeps for the backward pass, and the batch."""
    temporary: int
    """What the backward pass makes and frees."""
    reading: int
    """By how much more the process holds while it reads the base in 32 bits, to hold it in fewer, than in a step."""
    preview: int
    """By how much more it holds while the VAE decodes a sample image, than in a step."""

    @property
    def total(self) -> int:
        return sum(self)


def meta_recipe(
    kind: type[Recipe], cfg: TrainingConfig, group: int, log: Callable[[str], None]
) -> tuple[Recipe, RecipeDataset]:
    """A recipe without its weights, on the meta device, and its dataset.

    Args:
        group: images per optimizer step, over all processes.

    Raises:
        UserError: the settings do not fit the data or the model.
    """
    recipe = kind(cfg, torch.device("meta")).to("meta")
    return recipe, recipe.dataset(group, log)


def estimate(recipe: Recipe, dataset: RecipeDataset, device: torch.device, base: int | None = None) -> MemoryEstimate:
    """What a step needs at its worst moment on ``device``, once the optimizer has a state.

    Args:
        recipe: of `meta_recipe`; it is of no use afterwards.
        base: that of an estimate made before in this process; ``None`` measures it, on a CPU.

    Raises:
        UserError: the device cannot do what the settings ask for.
        RuntimeError: the step reads values, which shapes do not have.
    """
    cfg = recipe.cfg
    batch = heaviest_batch(cfg, dataset)
    if isinstance(recipe, FineTune):
        recipe.family.unload_frozen()  # it gave the shapes of what is cached; a step has only what it uses
        if isinstance(cfg, Captions) and cfg.lazy_cache:
            recipe.family.part("vae")  # it encodes images beside the first steps
    prepare_modules(recipe.train(), cfg.model_copy(update={"compile": False}), device)
    trained = [p for p in recipe.parameters() if p.requires_grad]
    with torch.no_grad(), as_frozen(recipe, trained):
        recipe(send_to_device(batch, "meta"))  # frozen parts are made when first used
    frozen = parts_of_preview(recipe)
    codes, decoded = quantised(recipe, device)
    state = state_size(cfg, trained, device)
    if base is None:  # the libraries of fewer bits are part of the process by now
        base = 0 if device.type == "cuda" else resident()
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = make_empty(recipe, device)
        captions = {name: x for name, x in batch.items() if not isinstance(x, Tensor)}
        shapes = {name: torch.empty_like(x, device=device) for name, x in batch.items() if isinstance(x, Tensor)}
        batch = shapes | captions
        worst = traced(recipe, batch, held)
        decoding = of_preview(recipe, frozen, device)
    need = MemoryEstimate(
        base=base,
        weights=size_of(held) + codes,
        optimizer=state,
        average=size_of(trained) if cfg.use_ema else 0,
        gradients=worst["gradients"],
        activations=worst["activations"] + size_of(shapes.values()),
        temporary=worst["temporary"] + decoded,
        reading=0,
        preview=0,
    )
    read = base + need.weights + read_in_full(recipe) if device.type == "cpu" else 0
    kept = need.weights + need.optimizer + 2 * need.average  # the average takes the place of what it is kept beside
    return need._replace(
        reading=max(0, read - need.total), preview=max(0, base + kept + decoding - max(read, need.total))
    )


@contextmanager
def as_frozen(recipe: Recipe, trained: list[nn.Parameter]) -> Iterator[None]:
    """Context in which weights that train have the precision of the frozen parts: there is no autocast on meta."""
    kept = [p.data for p in trained]
    if isinstance(recipe, FineTune):
        for p in trained:
            p.data = p.data.to(recipe.family.dtype)
    yield
    for p, data in zip(trained, kept, strict=True):
        p.data = data


def traced(recipe: Recipe, batch: dict[str, Any], held: list[Tensor]) -> Counter[str]:
    """The worst moment of a step's forward and backward passes beside ``held`` and ``batch``, in bytes by kind."""
    alive = PeakMemoryMode([*held, *(x for x in batch.values() if isinstance(x, Tensor))])
    for p in recipe.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(alive.mark_gradient)
    for module in recipe.modules():
        if isinstance(module, LycorisLayer):
            module.training = False  # else it draws a number and looks at it, and there are no values here
    device = next(x.device for x in batch.values() if isinstance(x, Tensor))
    engine = Engine(recipe, recipe.cfg, Alone(device))
    with alive:
        for alive.kind in passes(engine, batch):
            pass
    return alive.worst


class Alone(NamedTuple):
    """What an engine reads of an Accelerator, of one process."""

    device: torch.device
    num_processes: int = 1


def passes(engine: Engine, batch: dict[str, Any]) -> Iterator[str]:
    """A step's forward and backward passes; yields before each the kind of the tensors that it will make."""
    for _ in range(min(engine.accumulation, 2)):  # the second meets the gradients of the first
        yield "activations"
        loss, figures = engine(batch)
        yield "temporary"
        engine.backward(loss.mean())
        del loss, figures


def trial_step(kind: type[Recipe], cfg: TrainingConfig, device: torch.device, group: int) -> int:
    """Bytes at the worst moment of one real step on a GPU, by its allocator's own count; nothing is saved.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    torch.cuda.reset_peak_memory_stats(device)
    recipe = kind(cfg, device)
    dataset = recipe.dataset(group, lambda line: None)
    prepare_modules(recipe.train(), cfg, device)
    batch = send_to_device(heaviest_batch(cfg, dataset), device)
    optimizer = optim.make_optimizer(cfg, recipe.parameter_groups())
    weights = {name: p for name, p in recipe.named_parameters() if p.requires_grad}
    average = optim.Average(cfg, weights) if cfg.use_ema else None
    engine = Engine(recipe, cfg, Alone(device))
    for _ in range(2):  # the second meets the optimizer's state
        for _ in passes(engine, batch):
            pass
        engine.step(optimizer, cfg.max_grad_norm)
        if average:
            average.update(1)
    return torch.cuda.max_memory_allocated(device)


def make_empty(recipe: Recipe, device: torch.device) -> list[Tensor]:
    """Make a recipe of the meta device, and the frozen parts beside it, empty tensors on ``device``; all of these."""
    parts: list[nn.Module] = [recipe]
    if isinstance(recipe, FineTune):
        parts += recipe.family.parts.values()
        recipe.family.device = device
    return empty_modules(parts, device)


def quantised(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Bytes that codes of a quantised base add to its weights as they are, and those of one of its weights in use.

    They take the place of what they stand for, and so add less than nothing. But on a CPU a base in the precision of
    its file is that file, mapped into memory, which stays there as long as one of its weights is used, as those of
    convolutions are.
    """
    cfg = recipe.cfg
    if not (isinstance(recipe, FineTune) and isinstance(cfg, Adapter) and cfg.quantize_base):
        return 0, 0
    require(cfg.quantize_base)
    mapped = device.type == "cpu" and recipe.family.dtype == torch.float32 and recipe.cfg.variant is None
    plain, coded, largest = zip(*(sizes(part, cfg.quantize_base) for part in recipe.trained.values()), strict=True)
    return sum(coded) - (0 if mapped else sum(plain)), max(largest)


def read_in_full(recipe: Recipe) -> int:
    """Bytes in 32 bits of the largest part of a base that is held in fewer: while it is read it is there twice."""
    if not isinstance(recipe, FineTune) or recipe.cfg.variant is not None or recipe.family.dtype == torch.float32:
        return 0
    return int(max(4 * sum(p.numel() for p in part.parameters()) for part in recipe.family.parts.values()))


STAND_IN = 512
"""Side of the matrix that stands in for a larger weight."""


def state_size(cfg: TrainingConfig, weights: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that the optimizer of ``cfg`` keeps, found by having it step on a small weight in place of each large one.

    Optimizers of 8 and 4 bits keep small weights, and those that no block divides, in 32 bits; what stands in for a
    weight is treated alike.
    """
    shapes = Counter(tuple(w.shape) for w in weights)
    total = 0
    for shape, count in shapes.items():
        numel, like = math.prod(shape), shape
        if numel > STAND_IN**2:
            side = (STAND_IN, STAND_IN) if numel % 256 == 0 else (STAND_IN - 1, STAND_IN + 1)
            like = side if len(shape) > 1 else (math.prod(side),)
        w = nn.Parameter(torch.zeros(like, device=device))
        w.grad = torch.ones_like(w)
        optimizer = optim.make_optimizer(cfg, [{"params": [w], "lr": cfg.learning_rate}])
        optim.clipped_step(optimizer, torch.ones((), device=device), 1.0)
        kept, _ = optimizer_state.save_state(optimizer, {w: "w"})
        size = sum(t.nbytes for name, t in kept.items() if name.startswith("w|"))
        total += round(count * size * numel / w.numel())
    return total


def heaviest_batch(cfg: TrainingConfig, dataset: RecipeDataset) -> dict[str, Any]:
    """A batch of the image of the first epoch that has the most pixels, on the CPU or, of a meta recipe, on meta."""
    stream, position = dataset.stream, 0
    if cfg.buckets:
        area = [width * height for width, height in stream.shapes]
        most = max(area[index] for index in stream.indices)
        position = next(p for p in range(stream.epoch_length) if area[stream[p].index] == most)
    item = {name: x for name, x in dataset[position].items() if name != "name"}
    batch: dict[str, Tensor] = default_collate([item] * cfg.train_batch_size)
    return batch


def resident() -> int:
    """Bytes of this process that are in memory now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no VmRSS")
