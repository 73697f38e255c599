"""How much memory a sample grid needs beyond a step, found without drawing one (see ``memory_estimate``)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sdtune.recipes.finetune import FineTune
from sdtune.recipes.recipe import Recipe
from sdtune.training.peak_memory import PeakMemoryMode


def parts_of_preview(recipe: Recipe) -> dict[str, nn.Module]:
    """The frozen parts, on the meta device, that are read for a sample grid and are not there in a step."""
    if not (isinstance(recipe, FineTune) and recipe.cfg.num_validation_images):
        return {}
    family, there = recipe.family, dict(recipe.family.parts)
    parts = {name: family.part(name) for name in ("vae", *family.encoders) if name not in there}
    family.parts = there
    return parts


def of_preview(recipe: Recipe, frozen: dict[str, nn.Module], device: torch.device) -> int:
    """Bytes of the parts that a sample grid takes and a step does not, and of decoding one image by the VAE."""
    if not (isinstance(recipe, FineTune) and recipe.cfg.num_validation_images):
        return 0
    family, there = recipe.family, recipe.family.parts
    held = empty_modules(frozen.values(), device)
    family.parts = there | frozen
    side = recipe.cfg.resolution // family.downscale
    z = torch.empty(1, family.latent_channels, side, side, device=device)
    alive = PeakMemoryMode([*held, z])
    with alive, torch.no_grad():
        family.decode(z)
    family.parts = there
    return size_of(held) + alive.worst.total()


def empty_modules(parts: Iterable[nn.Module], device: torch.device) -> list[Tensor]:
    """Make the tensors of modules empty ones on ``device``; all of them."""
    made: dict[Tensor, Tensor] = {}  # what is shared stays so
    for module in dict.fromkeys(module for part in parts for module in part.modules()):
        for name, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if old not in made:
                # Not empty_like: it makes a fake tensor of the old one first, which takes as long as a forward pass
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[old])
    return list(made.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
