"""Versions, machine and devices of a run, for ``sdtune env`` and ``environment.json``.

Versions are read from the metadata of installed packages, without importing them.
"""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sdtune import __version__

PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft"),
    *("datasets", "safetensors", "huggingface_hub", "numpy", "pillow"),
)


def environment() -> dict[str, str | list[str]]:
    """Names and values to print, in order; packages that are absent read ``not installed``.

    Imports torch, for the devices. Holds no paths, user or host names: it goes into model cards.
    """
    import torch

    facts: dict[str, str | list[str]] = {"sdtune": __version__, "python": platform.python_version()}
    facts |= {name: _version(name) for name in PACKAGES}
    facts["torchvision"] = torchvision_state()
    facts["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {_cores()} cores, {torch.get_num_threads()} threads"
    facts["gpu"] = [_gpu(i) for i in range(torch.cuda.device_count())] or "none"
    if torch.cuda.is_available():
        facts["cuda"] = str(torch.version.cuda or f"ROCm {torch.version.hip}")
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


@cache
def torchvision_state() -> str:
    """``not installed``, its version, or ``VERSION, broken: why``.

    sdtune does without torchvision, but one that is installed and does not fit its torch makes transformers,
    peft and Stable Diffusion pipelines unimportable, with an error that names something else. Only an import
    can tell, and a failed one leaves this process half-initialised, so it happens in another, once.
    """
    if find_spec("torchvision") is None:
        return "not installed"
    try:
        run = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"{_version('torchvision')}, broken: its import does not return"
    if run.returncode == 0:
        return _version("torchvision")
    why = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    return f"{_version('torchvision')}, broken: {why} (pip uninstall torchvision; sdtune does not need it)"


@cache
def _version(package: str) -> str:
    try:
        return str(version(package))
    except PackageNotFoundError:
        return "not installed"


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(index: int) -> str:
    import torch

    card = torch.cuda.get_device_properties(index)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
