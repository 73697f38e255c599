"""A step run by DeepSpeed: ZeRO (Rajbhandari et al. 2020).

It cuts optimizer state and gradients into slices (stage 2), and the weights as well (stage 3), on the GPUs or in the
main memory.

DeepSpeed holds a float32 copy of what trains and scales fp16 losses by itself. Its own checkpoints are pickles of one
number of processes; these here are the same files as of any other run, filled through its functions that gather one
tensor at a time.
"""

import copy
import math
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from sdtune.config.sections import Optim, Run, UserError
from sdtune.recipes.recipe import Recipe
from sdtune.training import engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's; the number of steps is the third thing that it remembers."""
SCALE = ("cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What the scale of fp16 losses depends on besides itself."""


class Zero(engine.Engine):
    """
    Args:
        plugin: what the accelerate config says of DeepSpeed.

    Raises:
        UserError: options that DeepSpeed cannot serve.
    """

    def __init__(self, recipe: Recipe, cfg: Run, accelerator: Accelerator, plugin: DeepSpeedPlugin):
        super().__init__(recipe, cfg, accelerator)
        assert isinstance(cfg, Optim)
        if cfg.use_ema:
            raise UserError("--use-ema: DeepSpeed keeps the weights to itself; leave it out, or shard with FSDP2")
        if cfg.optimizer != "adamw" or cfg.use_8bit_adam:
            raise UserError(f"--optimizer {cfg.optimizer}: with DeepSpeed it is adamw; leave the option out")
        if self.overflows and not get_accelerator().is_fp16_supported():
            raise UserError("--mixed-precision fp16: DeepSpeed has none on this device; take bf16, or shard with FSDP2")
        self.rank = accelerator.process_index
        self.stage = stage = plugin.zero_stage
        self.told = f"weights: optimizer state in {self.world} slices, one on a process (DeepSpeed ZeRO-{stage})"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)  # DeepSpeed has its own
        self.spare = copy.deepcopy(recipe).cpu() if accelerator.is_main_process else None
        config = {k: v for k, v in plugin.deepspeed_config.items() if v != "auto"}
        zero = {k: v for k, v in config.get("zero_optimization", {}).items() if v != "auto"}
        self.config = config | {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": cfg.train_batch_size,
            "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
            "gradient_clipping": cfg.max_grad_norm,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.overflows, "initial_scale_power": round(math.log2(engine.INIT_SCALE))},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.config.pop("train_batch_size", None)

    def take(self, optimizer):
        self.names = {name: p for name, p in self.recipe.named_parameters() if p.requires_grad}
        self.model, *_ = deepspeed.initialize(
            model=self.recipe,
            optimizer=optimizer,
            model_parameters=list(self.names.values()),
            config=self.config,
            dist_init_required=False,
        )
        # Adam makes its state in the first step; what a checkpoint holds has to find a place before it
        zero = self.model.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:
            optimizer.state[part] = {key: torch.zeros_like(part) for key in MOMENTS}
            optimizer.state[part]["step"] = torch.zeros((), device=part.device)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def backward(self, loss):
        self.model.backward(loss)  # which divides by the accumulated passes
        self.model.step()  # of them the last one alone takes a step

    def step(self, optimizer, max_norm):
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.device).float()

    def gathered(self):
        for name, p in self.names.items():
            value = safe_get_full_fp32_param(p)
            if self.spare is not None:
                self.spare.get_parameter(name).data.copy_(value)
        return self.spare or self.recipe

    # ---- checkpoints -----------------------------------------------------------------------------------

    def weight(self, parameter):
        return safe_get_full_fp32_param(parameter)

    def set_weight(self, parameter, value):
        value = value.to(self.device)
        if self.stage == 3:
            mine = self.slice(parameter, value)
            safe_set_local_fp32_param(parameter, mine)
            parameter.ds_tensor.data.copy_(mine)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def slice(self, parameter: Any, value: Tensor) -> Tensor:
        """The part of a whole tensor that this process holds in stage 3; the last parts are padded."""
        size = parameter.ds_tensor.numel()
        flat = value.new_zeros(size * self.world)
        flat[: value.numel()] = value.flatten()
        return flat[size * self.rank : size * (self.rank + 1)]

    def save_optimizer(self, optimizer, names):
        tensors = {
            f"{name}|{key}": safe_get_full_optimizer_state(p, key) for p, name in names.items() for key in MOMENTS
        }
        taken = next(iter(optimizer.state.values()))["step"]
        tensors |= {f"{name}|step": taken.clone() for name in names.values()}
        return tensors, {"state": {}, "groups": [{"lr": group["lr"]} for group in optimizer.param_groups]}

    def load_optimizer(self, optimizer, names, tensors, numbers):
        for p, name in names.items():
            for key in MOMENTS:
                value = tensors[f"{name}|{key}"].to(self.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, self.slice(p, value), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)
        for state in optimizer.state.values():
            state["step"] = tensors[f"{next(iter(names.values()))}|step"].clone()

    def save_scale(self):
        if not self.overflows:
            return {}
        scaler = self.model.optimizer.loss_scaler
        plain = {
            "scale": scaler.cur_scale,
            "growth_factor": scaler.scale_factor,
            "backoff_factor": 1 / scaler.scale_factor,
            "growth_interval": scaler.scale_window,
            "_growth_tracker": scaler.cur_iter - scaler.last_overflow_iter - 1,
        }
        return plain | {name: getattr(scaler, name) for name in SCALE}

    def load_scale(self, saved):
        scaler = self.model.optimizer.loss_scaler
        scaler.cur_scale = saved["scale"]
        for name in SCALE:
            setattr(scaler, name, saved.get(name, getattr(scaler, name)))
