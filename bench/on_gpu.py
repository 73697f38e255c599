"""Rows of bench/gpu.py that look into a step on the GPU, each in a process of its own; without one, on the CPU."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import run
from memory import MALLOC, estimated
from torch import Tensor
from torch.utils.data import default_collate

from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.recipes.lora import Lora
from sdtune.recipes.recipe import split_loss
from sdtune.training import optim, repeated
from sdtune.training.engine import Engine, nan_unless_finite
from sdtune.training.memory_estimate import Alone
from sdtune.training.prepare import prepare_modules
from sdtune.training.repeated import RepeatedSteps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNITS = {"bf16": 2**-8, "fp16": 2**-11}
"""The relative error of one number that is rounded."""
LOSS, HALF, WORST = 2, 16, 64
"""Bounds of the loss, of half of the gradients, and of each, in units of it. The network is deeper than that of
tests/test_gate.py, where the reason is."""
LOSS_FP32, EACH_FP32 = 1e-6, 1e-4
"""Bounds of the loss, and of each gradient, in float32 without TF32."""


def config(**more: str) -> Any:
    values = {"model": "tiny", "dataset": "tiny-hearts", "resolution": "64", "train_batch_size": "2"}
    values |= {"output_dir": tempfile.mkdtemp(), "dataloader_num_workers": "0"}
    return parsing.resolve(LoraConfig, None, values | more, [])


def recipe_and_batch(cfg: Any, device: torch.device) -> tuple[Lora, dict[str, Any]]:
    """Adapters that have moved from their start, and two images."""
    torch.manual_seed(0)
    recipe = Lora(cfg, device)
    dataset = recipe.dataset(2, lambda line: None)
    numbers = torch.Generator().manual_seed(0)
    for name, p in recipe.named_parameters():
        if p.requires_grad and "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=numbers))
    batch = default_collate([dataset[0], dataset[1]])
    return recipe, {name: x for name, x in batch.items() if name not in ("name", "part")}


def of(recipe: Lora) -> dict[str, Tensor]:
    return {name: p.grad.double().cpu() for name, p in recipe.named_parameters() if p.grad is not None}


def right() -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each image, and gradients by name, of eager float64 on the CPU."""
    recipe, batch = recipe_and_batch(config(), torch.device("cpu"))
    recipe.double()
    recipe.family.dtype = torch.float64
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}
    loss = split_loss(recipe(wide))[0]
    loss.mean().backward()
    return loss.detach(), of(recipe)


def stepped(cfg: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, by the engine of a run on the device."""
    recipe, batch = recipe_and_batch(cfg, DEVICE)
    prepare_modules(recipe.train(), cfg, DEVICE)
    engine = Engine(recipe, cfg, Alone(DEVICE))
    if cfg.cuda_graphs:
        repeated.DEVICES.add(DEVICE.type)  # on a CPU the function that would be recorded is called again
        steps = RepeatedSteps(engine, recipe, cfg)
        steps(engine.receive(batch))
        engine.keep_gradients()  # of the second time, which is a replay
        steps.steps.clear()
        loss = steps(engine.receive(batch))[0]
    else:
        loss = engine(engine.receive(batch))[0]
        engine.backward(nan_unless_finite(loss.mean()))
    scale = engine.scaler.get_scale()
    return loss.detach().double().cpu(), {name: g / scale for name, g in of(recipe).items()}


def gradients(*options: str) -> None:
    """Compare the loss and each gradient in each precision; raises AssertionError.

    Args:
        options: that are on, each in a way of its own; "" is none.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    (loss, wanted), said = right(), []
    for option in options:
        for precision in ("no", *UNITS):
            cfg = config(mixed_precision=precision, **({option: "true"} if option else {}))
            found_loss, found = stepped(cfg)
            assert found.keys() == wanted.keys()
            of_loss = ((found_loss - loss).norm() / loss.norm()).item()
            errors = sorted(((found[n] - g).norm() / g.norm()).item() for n, g in wanted.items())
            median, worst = errors[len(errors) // 2], errors[-1]
            name = f"{precision} {option or 'eager'}"
            if precision == "no":
                bounds = LOSS_FP32, EACH_FP32, EACH_FP32
            else:
                bounds = LOSS * UNITS[precision], HALF * UNITS[precision], WORST * UNITS[precision]
            told = f"{name}: loss {of_loss:.0e}, median of gradients {median:.0e}, worst {worst:.0e}"
            assert of_loss < bounds[0] and median < bounds[1] and worst < bounds[2], f"{told}; bounds {bounds}"
            said.append(told)
    print("; ".join(said))


def no_waiting() -> None:
    """Three steps; raises RuntimeError where one makes the host wait."""
    cfg = config(mixed_precision="bf16", snr_gamma="5")
    recipe, batch = recipe_and_batch(cfg, DEVICE)
    prepare_modules(recipe.train(), cfg, DEVICE)
    engine = Engine(recipe, cfg, Alone(DEVICE))
    optimizer = optim.make_optimizer(cfg, recipe.parameter_groups())
    for step in range(4):
        received = engine.receive(batch)
        if step == 1 and DEVICE.type == "cuda":  # the first step makes what is made once
            torch.cuda.set_sync_debug_mode("error")
        engine.backward(nan_unless_finite(engine(received)[0].mean()))
        engine.step(optimizer, cfg.max_grad_norm)
    if DEVICE.type != "cuda":
        print("four steps on the CPU, where nothing waits")
        return
    torch.cuda.set_sync_debug_mode("default")
    print("three steps without a wait")


def memory(work: str) -> None:
    """Compare the peak of a run with its estimate; more than a fifth apart raises AssertionError."""
    os.environ |= MALLOC
    said = []
    for precision in ("no", "bf16") if DEVICE.type == "cuda" else ("no",):
        words = ["lora", "--model", "tiny", "--dataset", "tiny-hearts", "--resolution", "64", "--train-batch-size", "8"]
        words += ["--num-validation-images", "0", "--dataloader-num-workers", "0", "--mixed-precision", precision]
        out = Path(work) / precision
        for _ in range(2):  # the second time nothing is encoded
            run(["-m", "sdtune", *words, "--steps", "3", "--log-steps", "1", "--overwrite", "--output-dir", str(out)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        peak = max(line["peak_memory"] for line in lines if "peak_memory" in line)
        need = sum(estimated([*words, "--output-dir", str(out / "none")]).values())
        assert abs(need / peak - 1) < 0.2, f"{precision}: estimate {need / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
        said.append(f"{precision}: {need / 1e6:.0f} MB estimated, {peak / 1e6:.0f} measured")
    print("; ".join(said))
