"""Optimizer, learning rate and moving average."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdtune.config.sections import Optim, UserError, finds_rate
from sdtune.diffusion.moving_average import move_average

NAMED = {
    "adamw": ("torch.optim:AdamW", ""),
    "adamw8bit": ("bitsandbytes.optim:AdamW8bit", "bnb"),
    "paged_adamw8bit": ("bitsandbytes.optim:PagedAdamW8bit", "bnb"),
    "torchao_adamw8bit": ("torchao.optim:AdamW8bit", "torchao"),
    "torchao_adamw4bit": ("torchao.optim:AdamW4bit", "torchao"),
    "torchao_adamwfp8": ("torchao.optim:AdamWFp8", "torchao"),
    "prodigy": ("pytorch_optimizer:Prodigy", "optimizers"),
    "adamw_schedulefree": ("pytorch_optimizer:ScheduleFreeAdamW", "optimizers"),
}
"""Short names of optimizers, and the extra of sdtune that installs each."""
FURTHER: dict[str, dict[str, Any]] = {
    "adabelief": {},
    "adafactor": {"relative_step": False, "scale_parameter": False},  # else it has a learning rate of its own
    "adan": {},
    "ademamix": {},
    "adopt": {},
    "came": {},
    "dadaptadam": {"weight_decouple": True},
    "lamb": {},
    "laprop": {},
    "lion": {},
    "soap": {},
    "radam": {},
    "stableadamw": {},
    "tiger": {},
}
"""Optimizers of pytorch-optimizer that continue from a checkpoint to the same bits, and arguments that each needs."""


def make_optimizer(cfg: Optim, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that ``cfg`` names, over the parameter groups of a recipe."""
    chosen = "adamw8bit" if cfg.use_8bit_adam else cfg.optimizer
    chosen = chosen if ":" in chosen else chosen.lower()  # as papers and other trainers write Lion and AdamW8bit
    path, extra = NAMED.get(chosen, (chosen, ""))
    if chosen in FURTHER:
        path, extra = f"pytorch_optimizer:{chosen}", "optimizers"
    if chosen == "paged_adamw8bit" and any(p.device.type == "cpu" for group in groups for p in group["params"]):
        raise UserError(f"--optimizer {chosen}: its pages are those of a GPU; on a CPU, adamw8bit is the same")
    module, _, name = path.partition(":")
    if not name:
        raise UserError(f"--optimizer {chosen}: is none of {', '.join([*NAMED, *FURTHER])}, nor written module:Class")
    try:
        library = importlib.import_module(module)
        kind = library.load_optimizer(name) if chosen in FURTHER else getattr(library, name)
    except (ImportError, AttributeError) as error:
        hint = f"; pip install 'sdtune[{extra}]'" if extra else ""
        raise UserError(f"--optimizer {chosen}: {error}{hint}") from None
    options: dict[str, Any] = {"lr": cfg.learning_rate}
    if chosen in NAMED:
        options |= {
            "betas": (cfg.adam_beta1, cfg.adam_beta2),
            "eps": cfg.adam_epsilon,
            "weight_decay": cfg.adam_weight_decay,
        }
    if chosen in FURTHER:
        declared = type(cfg).model_fields
        if own := [n for n in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(cfg, n) != declared[n].default]:
            flag = "--" + own[0].replace("_", "-")
            raise UserError(f"{flag}: has no effect on --optimizer {chosen}; --optimizer-args takes its own arguments")
        options |= {"weight_decay": cfg.adam_weight_decay} | FURTHER[chosen]
    if chosen == "adamw":
        options["fused"] = True  # one kernel, and the only one that can skip a step without asking the GPU
    if finds_rate(chosen) and len({group.get("lr") for group in groups}) > 1:
        raise UserError(
            f"--optimizer {chosen}: finds one learning rate for all that trains; give no part one of its own"
        )
    # Prodigy takes the rate of all parts from the first, which must not be one that ends before the others
    groups = sorted(groups, key=lambda group: -group.get("stop_fraction", 1.0))
    try:
        optimizer: Optimizer = kind(groups, **options | cfg.optimizer_args)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {chosen}: {error}") from None
    if hasattr(optimizer, "train"):  # Schedule-Free is made ready to evaluate
        optimizer.train()
    return optimizer


def lr_schedule(cfg: Optim, total: int) -> Callable[[int], float]:
    """The factor of the peak learning rate as a function of the step: there is no schedule to save or restore."""
    from diffusers.optimization import get_scheduler

    if cfg.lr_scheduler == "piecewise_constant" and not cfg.lr_step_rules:
        raise UserError("--lr-scheduler piecewise_constant: wants --lr-step-rules, such as 1:100,0.1:200,0.01")
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        cfg.lr_scheduler,
        unused,
        step_rules=cfg.lr_step_rules,
        num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def rate_jump(cfg: Optim, step: int, planned: int, total: int) -> str | None:
    """What the learning rate does when a run is continued to another end than was planned; ``None`` if nothing.

    Args:
        step: where the run goes on.
        planned: steps that it was to have when it was last trained.
    """
    before, after = (lr_schedule(cfg, end)(step) for end in (planned, total))
    if abs(before - after) < 1e-3:
        return None
    return (
        f"the run was to end at step {planned:,} and now ends at {total:,}: under {cfg.lr_scheduler} its learning rate "
        f"jumps at step {step:,} from {before:.3g} to {after:.3g} of the peak"
    )


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group its learning rate; torchao keeps it in a tensor, which it wants filled."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def drop_gradients(group: dict[str, Any]) -> None:
    """Leave the parameters of a group out of the step: without a gradient every optimizer passes them over."""
    for p in group["params"]:
        p.grad = None


def clip(weights: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of this norm down to ``max_norm``, if it is less."""
    nn.utils.clip_grads_with_norm_(weights, max_norm, norm)


def clipped_step(optimizer: Any, norm: Tensor, max_norm: float) -> None:
    """Clip gradients and take the step, unless their norm is infinite or not a number.

    The fused optimizers divide each gradient while they read it, and read ``found_inf`` on the device: so the gradients
    are gone through once, and the host does not wait. With the others it does.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (norm - norm != 0).float()
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    elif norm.isfinite():
        clip([p for group in optimizer.param_groups for p in group["params"]], norm, max_norm)
        with eager(norm.device):
            optimizer.step()


def eager(device: torch.device) -> Any:
    """On a CPU, run what torchao compiles without compiling it: there torch.compile has returned wrong results."""
    return torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()


class Average:
    """Exponential moving average of the trained weights, its decay a function of the step.

    decay = min(ema_decay, 1 - (1 + step / inv_gamma) ^ -power), the warm-up that Crowson's k-diffusion and diffusers
    use: an average of few steps must not remember the start. With ``ema_warmup`` ratio it is instead (1 + step) /
    (10 + step), and 0 at the start, which diffusers' EMAModel follows unless it is told otherwise.
    """

    def __init__(self, cfg: Optim, weights: Mapping[str, Tensor]):
        self.cfg, self.live = cfg, weights
        self.mean = {name: w.detach().clone() for name, w in weights.items()}

    def decay(self, step: int) -> float:
        if self.cfg.ema_warmup == "ratio":
            return min(self.cfg.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        warm_up: float = 1 - (1 + step / self.cfg.ema_inv_gamma) ** -self.cfg.ema_power
        return min(self.cfg.ema_decay, warm_up)

    def update(self, step: int) -> None:
        """Move towards the weights that step ``step`` (counted from 1) has left."""
        # the first update counts as step 0 of the warm-up: its decay is 0, so the start is forgotten
        move_average(self.mean.values(), self.live.values(), self.decay(step - 1))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average while this lasts."""
        kept = {name: w.detach().clone() for name, w in self.live.items()}
        self._copy(self.mean)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, w in self.live.items():
            w.copy_(source[name])


@contextmanager
def evaluation(optimizer: Any) -> Iterator[None]:
    """Schedule-Free optimizers train at one point and evaluate at another; the others have nothing to do."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [w.detach().clone() for w in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():  # there and back is exact up to rounding, and an evaluation must not change the run
            for w, before in zip(weights, kept, strict=True):
                w.copy_(before)
