"""Denoising Diffusion Probabilistic Models (Ho et al. 2020, equations 4 and 14), on pixels.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise        L_simple = E |noise - noise_theta(x_t, t)|^2

With classes the network is noise_theta(x_t, t, c), and c is the null class for a share of the images, so that one
network is both models of classifier-free guidance (Ho & Salimans 2022, algorithm 1). With a learned variance the loss
is that of Nichol & Dhariwal 2021, in `variational_bound`.
"""

import torch

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data import open_images, open_stream
from sdtune.data.pixel_dataset import choose_mode, class_names, pixel_dataset
from sdtune.diffusion import noise_schedule
from sdtune.diffusion.objective import DDPM, denoising_loss
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.diffusion.variational_bound import LEARNED, VariationalBound, hybrid_loss
from sdtune.models import pixel_models
from sdtune.recipes.recipe import Recipe


class Ddpm(Recipe):
    Config = DdpmConfig
    repeats = True

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        model = pixel_models.plan(cfg)
        self.scheduler = noise_schedule.noise_scheduler(cfg, model.scheduler)
        self.objective = DDPM.of(cfg, self.scheduler)
        self.images = open_images(cfg, captions=False, class_column=cfg.class_column)
        self.mode = choose_mode(cfg, self.images, model.channels)
        self.classes = class_names(cfg, self.images, model.classes)
        learned = self.scheduler.config.variance_type == LEARNED
        self.bound = VariationalBound(self.objective, cfg.levels) if learned else None
        self.unet = pixel_models.build(cfg, model, len(self.mode), self.classes, learned)

    def dataset(self, group, log):
        for line in (pixel_models.describe(self.unet), *noise_schedule.describe(self.scheduler)):
            log(line)
        stream = open_stream(self.cfg, self.images, group, self.mode)
        return pixel_dataset(self.cfg, stream, log, self.classes, self.cfg.class_dropout)

    def forward(self, batch):
        x0, c = batch["pixels"], batch.get("label")

        def predict(x_t, t):
            return self.unet(x_t, t, class_labels=c).sample

        if self.bound:
            return hybrid_loss(self.bound, predict, x0, batch)
        return denoising_loss(self.objective, predict, x0, batch)

    def sample(self, prompts, seeds):
        c = torch.tensor([self.classes.index(name) for name in prompts]) if self.classes else None
        ddim = make_scheduler("ddim", self.scheduler)
        steps = min(self.cfg.validation_inference_steps, len(self.scheduler.alphas_cumprod))
        guidance = self.cfg.validation_guidance_scale if self.classes else 1.0
        return to_images(draw(self.unet, ddim, list(seeds), steps=steps, labels=c, guidance_scale=guidance))

    def export(self, out):
        return pixel_models.save(out, self.unet, self.scheduler, self.classes)
