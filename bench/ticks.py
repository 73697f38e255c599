"""Runs a training script, or ``-m module``, and notes the CPU seconds of the process at each optimizer step.

    python bench/ticks.py ticks.json -m sdtune lora ...
    python bench/ticks.py ticks.json train_text_to_image_lora.py ...

The steps are those of torch's AdamW, which sdtune and other trainers have in common. With TICKS=wall in the environment
the seconds are those of the wall.
"""

import importlib.abc
import importlib.util
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

clock: list[float] = []
now = time.perf_counter if os.environ.get("TICKS") == "wall" else time.process_time


class NotesSteps(importlib.abc.MetaPathFinder):
    """Has AdamW note its steps once the script imports it; sdtune sets up memory before it imports torch."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch.optim.adamw":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            original = module.AdamW.step

            def step(self: Any, *args: Any, **kwargs: Any) -> Any:
                out = original(self, *args, **kwargs)
                clock.append(now())
                return out

            module.AdamW.step = step

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    sys.meta_path.insert(0, NotesSteps())
    _, file, *words = sys.argv
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    finally:
        Path(file).write_text(json.dumps(clock), encoding="utf-8")
