"""The message of a run that ran out of memory: the options with which it would fit, as `sdtune check` finds them."""

import torch

from sdtune.config.sections import RunFailed
from sdtune.config.untrusted import echo
from sdtune.recipes.recipe import Recipe, TrainingConfig
from sdtune.run.barrier import parted
from sdtune.run.device import out_of_memory
from sdtune.training.batch_size import Estimates, fitting_changes, flags, human_bytes, limit_of

SHARE = 0.9
"""Of the estimate of the run as it was, what an option has to get below: that much was too much, whatever is there."""
MOST = 3
"""Options that are named."""


def failure(
    kind: type[Recipe], cfg: TrainingConfig, device: torch.device, world: int, error: BaseException
) -> RunFailed:
    """The error of a run whose memory was full, with the options that save enough, each estimated on shapes alone."""
    message = out_of_memory(error, device)
    echo(f"{message}; looking for options with which it fits", err=True)
    try:
        with parted():
            estimates = Estimates(kind, cfg, device, world)
            needed = estimates.of().total
            limit = min(limit_of(None, device), int(SHARE * needed))
            found = [(changed, need) for changed, need in fitting_changes(estimates, limit) if changed]
    except Exception:  # an estimate fails for reasons of its own, and the first error is the one to tell
        return RunFailed(f"{message}; `sdtune check`, with the same options, says what makes it fit")
    if not found:
        return RunFailed(f"{message}; a step needs about {human_bytes(needed)}, and no option saves enough of it")
    ways = [f"{flags(changed)} ({human_bytes(need.total)})" for changed, need in found[:MOST]]
    return RunFailed(f"{message}; a step needs about {human_bytes(needed)}; it needs less with {', or '.join(ways)}")
