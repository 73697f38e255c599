"""Super-resolution, a stage of a cascade (Ho et al. 2021, Cascaded Diffusion Models, sections 3 and 4.2), on pixels.

    L = L_hybrid(x_theta([x_t, z_s], t, s), x_0)        z_s = a_s up(down(x_0)) + s_s noise',  s uniform in 0 ... s_max

Conditioning augmentation: the small image is noised, and the network is told how much, so that flaws of the model
before look like noise. The loss is that of Nichol & Dhariwal 2021 (`variational_bound`), since the stock pipeline of
super-resolution takes a learned variance. The small image is enlarged and noised as that pipeline does it.
"""

import torch

from sdtune.config.methods.super_resolution import SuperResolutionConfig
from sdtune.data import open_images, open_stream
from sdtune.data.enlarging import enlarging_dataset
from sdtune.diffusion import noise_schedule
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.variational_bound import VariationalBound, hybrid_loss
from sdtune.models import enlargers, pixel_models
from sdtune.recipes.recipe import Recipe
from sdtune.sampling.enlarge import enlarge


class SuperResolution(Recipe):
    Config = SuperResolutionConfig
    repeats = True

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.scheduler = noise_schedule.noise_scheduler(cfg)
        self.objective = DDPM.of(cfg, self.scheduler)
        self.bound = VariationalBound(self.objective, cfg.levels)
        self.images = open_images(cfg, captions=False)
        self.unet = enlargers.build(cfg, self.scheduler)

    def dataset(self, group, log):
        for line in (pixel_models.describe(self.unet), *noise_schedule.describe(self.scheduler)):
            log(line)
        stream = open_stream(self.cfg, self.images, group)
        return enlarging_dataset(
            stream, self.cfg.factor, log, self.cfg.validation_image or self.cfg.num_validation_images
        )

    def forward(self, batch):
        x0 = batch["pixels"]
        level = (batch["small_u"] * (self.cfg.max_noise_level + 1)).long()
        z = self.objective.noise(enlargers.enlarged(batch["small"], x0.shape[-2:]), batch["small_noise"], level)

        def predict(x_t, t):
            return self.unet(
                torch.cat([x_t, z], 1), t, encoder_hidden_states=enlargers.no_text(x_t), class_labels=level
            ).sample

        return hybrid_loss(self.bound, predict, x0, batch)

    def sample(self, prompts, seeds):
        pipe = enlargers.pipeline(self.unet, self.scheduler)
        small = [prompt.images[0] for prompt in prompts]
        how = enlargers.sampling(self.cfg)
        return enlarge(pipe, small, list(seeds), how.factor, steps=how.steps)

    def export(self, out):
        return enlargers.save(out, self.unet, self.scheduler, enlargers.sampling(self.cfg))
