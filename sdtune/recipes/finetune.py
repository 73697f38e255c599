"""What recipes on a text-to-image base share: the data, the loss and the previews.

The loss is that of latent diffusion (Rombach et al. 2022, equation 2), with conditioning tau(y):

    L = E || eps - eps_theta(z_t, t, tau(y)) ||^2

or its form for velocity or image where the base regresses those. A method chooses which weights train.
"""

from typing import Any

import torch
from torch import nn

from sdtune import __version__
from sdtune.data import Images, Mixture, Shards, open_images, open_stream
from sdtune.data.text_to_image import text_to_image_dataset
from sdtune.diffusion.objective import denoising_loss
from sdtune.models import families
from sdtune.recipes.recipe import Recipe
from sdtune.run.precision import dtype_of
from sdtune.run.public_name import public_name
from sdtune.sampling.sample import generate


class FineTune(Recipe):
    """A recipe whose base is a text-to-image model.

    A subclass assigns the parts that train to itself as submodules, and lists them in ``trained`` by name, for their
    learning rates and for the artefact.
    """

    def __init__(self, cfg: Any, device: torch.device):
        super().__init__(cfg, device)
        self.images = self.load_images()
        self.family = families.load(cfg, device, dtype_of(cfg))
        self.trained: dict[str, nn.Module] = {}

    @property
    def trains_text(self) -> bool:
        """Whether text embeddings change during the run, so that they cannot be cached."""
        return any(p.requires_grad for name, p in self.named_parameters() if name.startswith("text_encoder."))

    def load_images(self) -> Images | Mixture | Shards:
        return open_images(self.cfg)

    def dataset(self, group, log):
        stream = open_stream(self.cfg, self.images, group)
        return text_to_image_dataset(self.cfg, self.family, stream, log, trains_text=self.trains_text)

    def forward(self, batch):
        x0, text = self.family.latents(batch), self.family.conditioning(batch)
        return denoising_loss(self.family.objective, lambda x_t, t: self.family.predict(x_t, t, text), x0, batch)

    def parameter_groups(self):
        cfg = self.cfg
        rates = {"unet": cfg.learning_rate}
        if "text_encoder" in self.trained:
            rates["text_encoder"] = cfg.text_encoder_lr or cfg.learning_rate
        return [
            {"params": [p for p in part.parameters() if p.requires_grad], "lr": rates[name]}
            for name, part in self.trained.items()
        ]

    def sample(self, prompts, seeds):
        cfg, family = self.cfg, self.family
        with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
            images = generate(
                family.pipeline(),
                prompts,
                seeds,
                steps=cfg.validation_inference_steps,
                guidance_scale=cfg.validation_guidance_scale,
                negative_prompt=cfg.negative_prompt,
                width=cfg.resolution,
                height=cfg.resolution,
            )
        family.unload_frozen()
        return images

    def provenance(self) -> dict[str, Any]:
        """Facts about the run that its artefact carries."""
        base = public_name(self.cfg.model)
        return {"version": __version__, "base": base, "revision": self.cfg.revision, "seed": self.cfg.seed}


def unfreeze(module: nn.Module) -> nn.Module:
    """The module in fp32, training: updates in half precision would round to nothing."""
    return module.float().requires_grad_(True)
