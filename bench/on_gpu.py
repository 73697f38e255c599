"""Rows of bench/gpu.py that look into a step on the GPU, each in a process of its own."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import run
from torch import Tensor
from torch.utils.data import default_collate

from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.recipes.lora import Lora
from sdtune.recipes.recipe import split_loss
from sdtune.training import optim
from sdtune.training.engine import Engine, nan_unless_finite
from sdtune.training.memory_estimate import Alone, estimate, meta_recipe
from sdtune.training.prepare import prepare_modules
from sdtune.training.repeated import RepeatedSteps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {"no": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Of the median error of a gradient, by precision."""


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


def gradients() -> None:
    """Compare; raises AssertionError."""
    recipe, batch = recipe_and_batch(config(), torch.device("cpu"))
    recipe.double()
    recipe.family.dtype = torch.float64
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}
    split_loss(recipe(wide))[0].mean().backward()
    wanted, said = of(recipe), []
    ways: list[dict[str, str]] = [{}, {"gradient_checkpointing": "true"}]
    ways += [{"compile": "true"}, {"cuda_graphs": "true"}] if DEVICE.type == "cuda" else []
    for precision, bound in BOUNDS.items():
        for more in ways:
            cfg = config(mixed_precision=precision, **more)
            recipe, batch = recipe_and_batch(cfg, DEVICE)
            prepare_modules(recipe.train(), cfg, DEVICE)
            engine = Engine(recipe, cfg, Alone(DEVICE))
            if cfg.cuda_graphs:
                repeated = RepeatedSteps(engine, recipe, cfg)
                repeated(engine.receive(batch))
                engine.keep_gradients()  # of the second time, which is a replay
                repeated.steps.clear()
                repeated(engine.receive(batch))
            else:
                engine.backward(nan_unless_finite(engine(engine.receive(batch))[0].mean()))
            found = {name: g / engine.scaler.get_scale() for name, g in of(recipe).items()}
            errors = sorted(((found[n] - g).norm() / g.norm()).item() for n, g in wanted.items())
            name = f"{precision} {' '.join(more) or 'eager'}"
            assert errors[len(errors) // 2] < bound, (
                f"{name}: median error of a gradient {errors[len(errors) // 2]:.1e}"
            )
            said.append(f"{name} {errors[len(errors) // 2]:.1e} (worst {errors[-1]:.1e})")
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
        if step == 1:  # the first step makes what is made once
            torch.cuda.set_sync_debug_mode("error")
        engine.backward(nan_unless_finite(engine(received)[0].mean()))
        engine.step(optimizer, cfg.max_grad_norm)
    torch.cuda.set_sync_debug_mode("default")
    print("three steps without a wait")


def memory(work: str) -> None:
    """Compare the peak of a run with its estimate; more than a fifth apart raises AssertionError."""
    said = []
    for name, more in {"fp32": [], "bf16": ["--mixed-precision", "bf16"]}.items():
        words = ["lora", "--model", "tiny", "--dataset", "tiny-hearts", "--resolution", "64", "--train-batch-size", "8"]
        words += ["--steps", "3", "--log-steps", "1", "--num-validation-images", "0", *more]
        out = Path(work) / name
        run(["-m", "sdtune", *words, "--output-dir", str(out)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        peak = max(line["peak_memory"] for line in lines if "peak_memory" in line)
        cfg = config(train_batch_size="8", num_validation_images="0", mixed_precision="bf16" if more else "no")
        need = estimate(*meta_recipe(Lora, cfg, 8, lambda line: None), DEVICE).total
        assert abs(need / peak - 1) < 0.2, f"{name}: estimate {need / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
        said.append(f"{name}: {need / 1e6:.0f} MB estimated, {peak / 1e6:.0f} measured")
    print("; ".join(said))
