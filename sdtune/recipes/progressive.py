"""Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho 2022, algorithm 2), on pixels.

    L = max(a_t^2 / s_t^2, 1) || x_theta(z_t, t) - x~ ||^2

x~ is where one DDIM step of the student has to point to end where two of the teacher do. At the end of a phase the
student becomes the teacher of the next one, which takes half as many steps.
"""

import copy

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from sdtune.config.methods.progressive import ProgressiveConfig
from sdtune.config.sections import UserError
from sdtune.data import open_images, open_stream
from sdtune.data.pixel_dataset import choose_mode, class_names, pixel_dataset
from sdtune.diffusion.few_steps import dividing, follow, progressive_loss
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.models import pixel_models
from sdtune.recipes.recipe import Recipe
from sdtune.run.sampling_file import Sampling


class Progressive(Recipe):
    Config = ProgressiveConfig
    moved = ("teacher",)

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        model = pixel_models.plan(cfg)
        pixel_models.require_resolution(cfg, model)
        # Steps that end where the next begins, and at the clean image: then stock DDIM takes those that were learnt
        steps = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        noise = DDPMScheduler.from_config(model.scheduler)
        self.sampler = DDIMScheduler.from_config(noise.config, **steps)
        self.objective = DDPM(noise.alphas_cumprod, noise.config.prediction_type)
        T = len(noise.alphas_cumprod)
        if odd := [count for count in cfg.sampling_steps if T % count]:
            fitting = ", ".join(map(str, dividing(T, odd[0])))
            raise UserError(f"--sampling-steps {odd[0]}: does not divide the model's {T} timesteps, as do {fitting}")
        self.images = open_images(cfg, captions=False, class_column=cfg.class_column)
        self.mode = choose_mode(cfg, self.images, model.channels)
        self.classes = class_names(cfg, self.images, model.classes)
        self.unet = pixel_models.build(cfg, model, len(self.mode), self.classes)
        self.teacher = copy.deepcopy(self.unet).requires_grad_(False)

    def dataset(self, group, log):
        stream = open_stream(self.cfg, self.images, group, self.mode)
        return pixel_dataset(self.cfg, stream, log, self.classes, self.cfg.class_dropout)

    @property
    def phase_steps(self):
        return self.cfg.phase_steps or max(1, self.total_steps // len(self.cfg.sampling_steps))

    def count(self, step):
        """Steps of the student in the phase after ``step`` steps of training."""
        counts = self.cfg.sampling_steps
        return counts[min(step // self.phase_steps, len(counts) - 1)]

    def forward(self, batch):
        c = batch.get("label")
        student, teacher = (
            lambda x_t, t, unet=unet: unet(x_t, t, class_labels=c).sample for unet in (self.unet, self.teacher)
        )
        count = self.count(self.step)
        return progressive_loss(self.objective, student, teacher, batch["pixels"], batch, count)

    def after_step(self):
        if self.count(self.step) != self.count(self.step - 1):
            follow(self.teacher, self.unet, 0.0)

    @property
    def learnt(self):
        """Steps in which the student draws now: at the end of a phase, those of that phase."""
        return self.count(max(self.step - 1, 0))

    def sample(self, prompts, seeds):
        c = torch.tensor([self.classes.index(name) for name in prompts]) if self.classes else None
        return to_images(draw(self.unet, self.sampler, list(seeds), steps=self.learnt, labels=c))

    def export(self, out):
        sampling = Sampling(self.learnt)
        return pixel_models.save_pipeline(out, DDIMPipeline(self.unet, self.sampler), self.classes, sampling)
