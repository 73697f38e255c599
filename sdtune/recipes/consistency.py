"""Consistency Models (Song et al. 2023) on pixels, with the improvements of Song & Dhariwal 2023.

    L = E lambda d( f_theta(x + s_{i+1} z, s_{i+1}), f_theta-(x^, s_i) )

Distilled, x^ is where the teacher's path through x + s_{i+1} z is at s_i (algorithm 2). From scratch it is x + s_i z,
with the same noise (algorithm 3). theta- is theta without a gradient, or an average that follows it. The improved
method has lambda = 1 / (s_{i+1} - s_i), d pseudo-Huber, ln s normal, and doubles the levels from phase to phase.
"""

import copy
import math

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMScheduler

from sdtune.config.methods.consistency import ConsistencyConfig
from sdtune.data import open_images, open_stream
from sdtune.data.pixel_dataset import choose_mode, class_names, pixel_dataset
from sdtune.diffusion.few_steps import follow, same_dropout
from sdtune.diffusion.noise_levels import GROWTH, Levels, denoiser, lognormal_interval, pseudo_huber, solve
from sdtune.diffusion.objective import DDPM, per_image
from sdtune.diffusion.pixel_sampler import draw_consistency, to_images
from sdtune.diffusion.tables import Table
from sdtune.models import pixel_models
from sdtune.recipes.recipe import Recipe
from sdtune.run.sampling_file import Sampling


class ConsistencyModel(Recipe):
    Config = ConsistencyConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        model = pixel_models.plan(cfg)
        self.images = open_images(cfg, captions=False, class_column=cfg.class_column)
        self.mode = choose_mode(cfg, self.images, model.channels)
        self.classes = class_names(cfg, self.images, model.classes)
        self.unet = pixel_models.build(cfg, model, len(self.mode), self.classes)
        self.levels = Levels(cfg.sigma_min, cfg.sigma_max, cfg.rho, cfg.sigma_data)
        self.tables = {}
        if cfg.model:
            pixel_models.require_resolution(cfg, model)
            noise = DDPMScheduler.from_config(model.scheduler)
            self.objective = DDPM(noise.alphas_cumprod, noise.config.prediction_type)
            self.teacher = copy.deepcopy(self.unet).requires_grad_(False)
        if cfg.target_decay:
            self.target, self.moved = copy.deepcopy(self.unet).requires_grad_(False), ("target",)

    def dataset(self, group, log):
        log(pixel_models.describe(self.unet))
        stream = open_stream(self.cfg, self.images, group, self.mode)
        return pixel_dataset(self.cfg, stream, log, self.classes, self.cfg.class_dropout)

    @property
    def phase_steps(self):
        """Steps after which the number of levels is doubled, or after which it is at its highest."""
        cfg, parts = self.cfg, self.cfg.doublings + 1 if self.cfg.discretization == "doubling" else 1
        return None if cfg.discretization == "constant" else cfg.phase_steps or max(1, self.total_steps // parts)

    def intervals(self):
        """N(k), the number of intervals between noise levels at this step."""
        cfg, s_0, s_1 = self.cfg, self.cfg.discretization_s_0, self.cfg.discretization_s_1
        return GROWTH[cfg.discretization](self.step, self.phase_steps, s_0, s_1) if self.phase_steps else s_1

    def levels_on(self, device):
        """The noise levels of this step; those of a phase stay on the device."""
        if (count := self.intervals() + 1) not in self.tables:
            self.tables = {count: Table(self.levels.rising(count))}
        return self.tables[count].on(device)

    def forward(self, batch):
        cfg, u, x0, c = self.cfg, batch["u"], batch["pixels"], batch.get("label")
        levels = self.levels_on(u.device)
        count = len(levels) - 1
        uniform = cfg.density == "uniform"
        i = (u * count).long() if uniform else lognormal_interval(u, levels, cfg.p_mean, cfg.p_std)
        low, high = levels[i].to(x0), levels[i + 1].to(x0)
        x = x0 + per_image(high, x0) * batch["noise"]

        def network(part):
            return lambda x, t: part(x, t, class_labels=c).sample

        with same_dropout(x):
            wanted = self.wanted(x, x0 + per_image(low, x0) * batch["noise"], low, high, network)
        pred = self.levels.consistent(network(self.unet), x, high)
        if cfg.loss_type == "l2":
            return (pred - wanted).float().square().flatten(1).mean(1)
        loss = pseudo_huber(pred, wanted, cfg.huber_c or 0.00054 * math.sqrt(x0[0].numel()))
        return loss if self.step < cfg.match_steps else loss / (high - low)

    @torch.no_grad()
    def wanted(self, x, x_low, low, high, network):
        """What the student should say at ``x``: what the target says at the lower level; at first, the teacher here.

        Args:
            x_low: the same noise at the lower level, of which a teacher knows better.
        """
        if self.cfg.model:
            teacher = denoiser(self.objective, network(self.teacher))
            if self.step < self.cfg.match_steps:
                return teacher(x, high)
            x_low = solve(teacher, x, high, low, heun=self.cfg.solver == "heun")
        return self.levels.consistent(network(self.target if self.moved else self.unet), x_low, low)

    def after_step(self):
        if self.moved:
            follow(self.target, self.unet, self.cfg.target_decay)

    def sampler(self):
        cfg = self.cfg
        levels = {"sigma_min": cfg.sigma_min, "sigma_max": cfg.sigma_max, "sigma_data": cfg.sigma_data, "rho": cfg.rho}
        return CMStochasticIterativeScheduler(num_train_timesteps=cfg.discretization_s_1 + 1, **levels)

    def sample(self, prompts, seeds):
        c = torch.tensor([self.classes.index(name) for name in prompts]) if self.classes else None
        steps = self.cfg.validation_inference_steps
        return to_images(draw_consistency(self.unet, self.sampler(), list(seeds), steps=steps, labels=c))

    def export(self, out):
        sampling = Sampling(self.cfg.validation_inference_steps)
        pipeline = ConsistencyModelPipeline(self.unet, self.sampler())
        return pixel_models.save_pipeline(out, pipeline, self.classes, sampling)
