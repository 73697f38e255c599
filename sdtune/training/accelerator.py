"""Accelerate's part of a run: its processes, its device and its trackers; and how the device computes."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sdtune.config.sections import Run, UserError
from sdtune.run.precision import precision_of


def start_accelerator(cfg: Run) -> Accelerator:
    """Accelerate's part of a run: its processes, its device and its trackers; the engine sets the precision."""
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    precision_of(cfg)  # refuses before a model is read
    compute_alike(cfg.deterministic)
    patience = InitProcessGroupKwargs(timeout=collective_timeout(cfg))
    logs = cfg.output_dir / "logs"
    try:
        return Accelerator(
            mixed_precision="no", log_with=cfg.report_to or None, project_dir=logs, kwargs_handlers=[patience]
        )
    except (ImportError, ValueError) as error:
        read = [name for name in sorted(os.environ) if name.startswith("ACCELERATE_")]
        if not read:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{', '.join(read)} of the environment: {why}; unset what no launcher of yours set") from None


def compute_alike(always: bool) -> None:
    """Whether equal operations have to give equal bits, on a GPU too; one that cannot then raises RuntimeError."""
    if always:  # cuBLAS reads it when the GPU is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(always)
    torch.utils.deterministic.fill_uninitialized_memory = False


NCCL_MARGIN = 60
"""Seconds that NCCL waits longer than gloo."""


def collective_timeout(cfg: Run) -> timedelta:
    """How long a process waits for the others in a collective operation of the training itself.

    When a process hangs on a GPU, the others wait both in NCCL and in `StopSignals.agreed`, over gloo. NCCL ends the
    process without a word, so gloo has to give up first: its error becomes the line that says who did not answer.
    """
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    return timedelta(seconds=cfg.ddp_timeout + (NCCL_MARGIN if on_gpu else 0))
