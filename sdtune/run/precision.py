"""The precision of a run: that of its config, or else the one that ``accelerate launch`` set."""

import os

import torch

from sdtune.config.sections import Run, UserError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def precision_of(cfg: Run) -> str:
    """``no``, ``fp16``, ``bf16`` or ``fp8``.

    Raises:
        UserError: when config and launcher disagree, or neither is known here.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    launcher = None if launcher in ("", "no") else launcher
    if cfg.mixed_precision and launcher and cfg.mixed_precision != launcher:
        raise UserError(
            f"--mixed-precision {cfg.mixed_precision}: accelerate launch sets {launcher}; leave one of them out"
        )
    chosen = cfg.mixed_precision or launcher or "no"
    if chosen not in DTYPES:
        raise UserError(f"accelerate launch --mixed_precision {chosen}: sdtune knows {', '.join(DTYPES)}")
    return chosen


def dtype_of(cfg: Run) -> torch.dtype:
    return DTYPES[precision_of(cfg)]
