"""How a step runs on the processes of a run: replicated (DDP) or sharded (FSDP2), and in which precision.

What trains is float32 in every case. In half precision the forward pass is autocast (Micikevicius et al. 2018), and
fp16 losses are scaled, so that small gradients do not round to nothing; a step whose gradient is not finite is skipped.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sdtune.config.sections import Run
from sdtune.diffusion.tables import widest_float
from sdtune.models.fused_lora import HalfAdapters
from sdtune.models.lean_layers import join_projections
from sdtune.recipes.recipe import Recipe, split_loss
from sdtune.run.precision import dtype_of
from sdtune.training import optim, optimizer_state
from sdtune.training.slices import copy_in_main_memory, full_tensor, shard_like

INIT_SCALE = 2.0**16
"""By what fp16 losses are multiplied at first; halved after an overflow, doubled after 2000 steps without one."""


class Place(Protocol):
    """What an engine of one process reads of an Accelerator."""

    @property
    def device(self) -> torch.device: ...
    @property
    def num_processes(self) -> int: ...


class Engine:
    """The engine of one process, and the base of the others.

    ``model`` is called as the recipe is, and trains; inside it nothing is wrapped (see `recipe.Recipe`).
    """

    summary = ""
    """A line about how the processes hold the weights, printed after the plan; empty where each holds all."""

    holds_all = True
    """Whether a process holds all of each weight, and so may call the model while the others do not."""

    gradients_stay = False
    """Whether gradients are set to 0 after a step and keep their places; else they are dropped."""

    def __init__(self, recipe: Recipe, cfg: Run, accelerator: Place):
        self.recipe, self.device, self.world = recipe, accelerator.device, accelerator.num_processes
        self.dtype, self.accumulation = dtype_of(cfg), cfg.gradient_accumulation_steps
        self.scaler = torch.amp.GradScaler(self.device.type, INIT_SCALE, enabled=self.dtype == torch.float16)
        self.model: nn.Module = recipe
        if self.holds_all:
            join_projections(recipe)
        self.halves, self.within_step = self.adapters_in_half(), False

    def adapters_in_half(self) -> HalfAdapters | None:
        """The adapters of a recipe that trains nothing else beside a base in half precision; then there is no autocast.

        Its norms and sums would be in float32 and cast back, though the base's own pipelines have them in half
        precision; their kernels add up in float32 all the same.
        """
        if self.dtype == torch.float32:
            return None
        halves = HalfAdapters(self.recipe, self.dtype)
        return halves if halves.layers and halves.suffice else None

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a batch, in the precision of the run."""
        if self.halves and not self.halves.made:
            self.halves.make()
        with self.autocast():
            return split_loss(self.model(batch))

    def without_training(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a batch by this process alone, if engines of this kind allow that, without a gradient."""
        with torch.no_grad(), self.autocast():
            if self.halves:
                self.halves.make()
            found = split_loss(self.recipe(batch))
        if self.halves:
            self.halves.clear()
        return found

    def receive(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device of the run, without waiting for it; of a device without float64, in float32."""
        if (widest := widest_float(self.device)) != torch.float64:
            float64 = {name for name, x in batch.items() if isinstance(x, Tensor) and x.dtype == torch.float64}
            batch = batch | {name: batch[name].to(widest) for name in float64}
        received: dict[str, Any] = send_to_device(batch, self.device, non_blocking=True)
        return received

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which the recipe runs in the precision of the run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32 and not self.halves)

    def local(self) -> AbstractContextManager[Any]:
        """Context of a forward and backward pass whose gradients stay with the process, to be added to."""
        return nullcontext()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Context of the micro-batches of a step, between which weights do not change: each is cast once for all."""
        if self.accumulation == 1:  # with one, a copy can go as soon as the backward pass is through with it
            yield
            return
        self.within_step = True
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            self.within_step = False
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            if self.halves:
                self.halves.clear()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one of the micro-batches of a step."""
        self.scaler.scale(loss / self.accumulation if self.accumulation > 1 else loss).backward()
        # Not before: with gradient checkpointing the backward pass computes forward again
        if self.halves and not self.within_step:
            self.halves.clear()

    def step(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Clip, take the step unless the gradient is not finite, and clear it; the gradient's norm before clipping."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        total = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        norm = full_tensor(total)
        if self.scaler.is_enabled():  # it tells the optimizer of an overflow itself, and would not take a second scale
            optim.clip(weights, total, max_norm)
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optim.clipped_step(optimizer, norm, max_norm)
        optimizer.zero_grad(set_to_none=not self.gradients_stay)
        return norm

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.recipe.parameters() if p.requires_grad]

    def keep_gradients(self) -> None:
        """From now on gradients keep their places, which a recording of the step needs."""
        self.gradients_stay = True
        for p in self.trained:
            p.grad = torch.zeros_like(p)

    @property
    def overflows(self) -> bool:
        """Whether losses are scaled, so that now and then a step is skipped as a matter of course."""
        return self.dtype == torch.float16

    def gather_recipe(self) -> Recipe:
        """The recipe with all weights on the first process, for export. Every process must call this."""
        return self.recipe

    # ---- checkpoints: full tensors; every process must call these ------------------------------------------

    def weight(self, parameter: Tensor) -> Tensor:
        """A trained weight, or its average, in float32."""
        return full_tensor(parameter.detach())

    def set_weight(self, parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(shard_like(value, parameter))

    def save_optimizer(
        self, optimizer: Optimizer, names: dict[Tensor, str]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `optimizer_state.save_state`; where processes hold slices, so do the tensors."""
        return optimizer_state.save_state(optimizer, names)

    def load_optimizer(
        self, optimizer: Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor], numbers: dict[str, Any]
    ) -> None:
        optimizer_state.load_state(optimizer, names, tensors, numbers)

    def save_scale(self) -> dict[str, Any]:
        """The scale of fp16 losses and the steps since it changed; empty in another precision."""
        return self.scaler.state_dict()

    def load_scale(self, saved: dict[str, Any]) -> None:
        """Go on with what `save_scale` gave, of this engine or another."""
        self.scaler.load_state_dict(saved)


def nan_unless_finite(loss: Tensor) -> Tensor:
    """A mean of losses; if one is not finite its gradient is NaN, from which every process learns of it."""
    return loss * (0 * loss.detach() + 1)


class Replicated(Engine):
    """Every process holds all weights, and the gradients are averaged (Li et al. 2020)."""

    def __init__(self, recipe: Recipe, cfg: Run, accelerator: Accelerator):
        super().__init__(recipe, cfg, accelerator)
        device = [self.device] if self.device.type == "cuda" else None
        self.replica = DistributedDataParallel(recipe, device, gradient_as_bucket_view=True, **FROZEN_BUFFERS)
        self.model = self.replica

    def local(self) -> AbstractContextManager[Any]:
        return self.replica.no_sync()


# Buffers are never trained. torch 2.13 has renamed the option.
FROZEN_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in DistributedDataParallel.__init__.__annotations__
    else {"broadcast_buffers": False}
)


class Sharded(Engine):
    """Every process holds a slice of each weight, and gathers a block when it computes it (Zhao et al. 2023, FSDP).

    Each part of the recipe (UNet, text encoder) is a root of its own, so that it can be called by itself, as sampling
    does. Then every process has to call it as often as the others.

    Args:
        plugin: what the accelerate config says of FSDP; of it count the blocks, resharding and offloading.
    """

    holds_all = False

    def __init__(self, recipe: Recipe, cfg: Run, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin):
        super().__init__(recipe, cfg, accelerator)
        self.summary = f"weights: each in {self.world} slices, one on a process (FSDP2)"
        # FSDP changes the classes and hooks of a module, so what is exported is a copy that it has not seen
        self.export_copy = copy_in_main_memory(recipe) if accelerator.is_main_process else None
        mesh = init_device_mesh(self.device.type, (self.world,))
        options: dict[str, Any] = {"mesh": mesh, "offload_policy": plugin.cpu_offload or OffloadPolicy()}
        if self.dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)
        self.roots = []
        for part in recipe.children():
            # What never has a backward pass would otherwise stay whole on each process after its first forward pass
            reshard = plugin.reshard_after_forward or not any(p.requires_grad for p in part.parameters())
            blocks = plugin.transformer_cls_names_to_wrap or getattr(part, "_no_split_modules", None) or []
            for module in reversed([m for m in part.modules() if type(m).__name__ in blocks and m is not part]):
                fully_shard(module, reshard_after_forward=reshard, **options)
            self.roots.append(fully_shard(part, reshard_after_forward=reshard, **options))

    def adapters_in_half(self) -> None:
        """None: FSDP casts each block as it gathers it."""

    @contextmanager
    def local(self) -> Iterator[None]:
        for root in self.roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in self.roots:
                root.set_requires_gradient_sync(True)

    def gather_recipe(self) -> Recipe:
        changing = {name: p for name, p in self.recipe.named_parameters() if p.requires_grad}
        changing |= self.recipe.moved_weights()
        copied = dict(self.export_copy.named_parameters()) if self.export_copy else {}
        for name, p in changing.items():  # one at a time: together they are what the slices are to save
            whole = full_tensor(p.detach())
            if name in copied:
                copied[name].data.copy_(whole)
            del whole
        if self.export_copy:
            self.export_copy.step = self.recipe.step
        return self.export_copy or self.recipe
