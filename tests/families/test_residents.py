"""Which parts of a base are on the device at a time: no text encoder beside the denoiser, but for samples."""

import pytest
import torch
from torch.utils.data import default_collate

from sdtune.config.methods.lora import LoraConfig
from sdtune.models.families import parts
from sdtune.models.families.latent import LatentFamily
from sdtune.recipes.lora import Lora
from sdtune.training.prepare import prepare_modules

DEVICE = torch.device("cpu", 0)
"""The same as where parts wait, under another name."""


@pytest.mark.parametrize("base", ["sd3", "flux-2-klein"])
def test_no_encoder_is_beside_the_denoiser_while_it_encodes_or_trains(base, bases, pictures, tmp_path, monkeypatch):
    there: set[int] = set()
    seen: dict[str, set[str]] = {}
    moved = parts.move

    def move(module, device):
        (there.add if device == DEVICE else there.discard)(id(module))
        return moved(module, device)

    def watched(name):
        method = getattr(LatentFamily, name)

        def call(self, inputs):
            out = method(self, inputs)
            seen.setdefault(name, set()).update(part for part, module in self.parts.items() if id(module) in there)
            return out

        return call

    monkeypatch.setattr(parts, "move", move)
    for name in ("moments", "encode"):
        monkeypatch.setattr(LatentFamily, name, watched(name))
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))  # nothing is encoded yet
    cfg = LoraConfig(model=str(bases(base)), dataset=str(pictures), resolution=32, output_dir=tmp_path / "run")
    recipe = Lora(cfg, DEVICE)
    dataset = recipe.dataset(2, lambda line: None)
    assert seen == {"moments": {"vae"}, "encode": set(recipe.family.encoders)}
    prepare_modules(recipe.train(), cfg, DEVICE)
    recipe(default_collate([dataset[0], dataset[1]])).mean().backward()
    assert list(recipe.family.parts) == [recipe.family.denoiser_name]
