"""Latent Consistency Models (Luo et al. 2023, algorithm 1): sampling in few steps, distilled from the base itself.

    L = E d( f_theta(z_{n+k}, w, c, t_{n+k}), f_theta-(z^_n, w, c, t_n) )
    z^_n = z_{n+k} + (1 + w) Psi(z_{n+k}, t_{n+k}, t_n, c) - w Psi(z_{n+k}, t_{n+k}, t_n, 0)

Psi is a step of DDIM over k timesteps, and w a guidance that is drawn anew for each image and told to the student.
theta- follows theta as a moving average. As LoRA (LCM-LoRA; Luo et al. 2023b), w is not told, and theta- is theta.
"""

import copy

from sdtune.config.methods.lcm import LcmConfig
from sdtune.config.sections import UserError
from sdtune.diffusion.few_steps import Consistency, dividing, follow, guidance_embedding
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.schedulers import lcm_scheduler
from sdtune.models.networks import reshaped
from sdtune.recipes.distillation import Distillation
from sdtune.run.sampling_file import Sampling


class Lcm(Distillation):
    Config = LcmConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        family = self.family
        if not isinstance(family.objective, DDPM):
            kind = family.pipeline_class.__name__
            raise UserError(
                f"--model {cfg.model}: a {kind}, made by flow matching; sdtune reflow distils those, lcm bases of DDPM"
            )
        if (T := len(family.objective.alphas_cumprod)) % cfg.num_ddim_timesteps:
            fitting = ", ".join(map(str, dividing(T, cfg.num_ddim_timesteps)))
            raise UserError(f"--num-ddim-timesteps {cfg.num_ddim_timesteps}: does not divide {T}, as do {fitting}")
        family.objective.huber_c = cfg.huber_c if cfg.loss_type == "huber" else None
        self.consistency = Consistency(family.objective, cfg.timestep_scaling)
        if cfg.lora:
            self.train_adapters()
            return
        self.add_student(reshaped(family.denoiser, time_cond_proj_dim=cfg.time_cond_proj_dim))
        self.target, self.moved = copy.deepcopy(self.student).requires_grad_(False), ("target",)

    def forward(self, batch):
        cfg, family, text = self.cfg, self.family, self.family.conditioning(batch)
        # What of `u` does not choose the teacher's step is uniform as well, and independent of it
        w = (cfg.w_min + (cfg.w_max - cfg.w_min) * (batch["u"] * cfg.num_ddim_timesteps).frac()).float()
        guidance = {} if cfg.lora else {"timestep_cond": guidance_embedding(w, cfg.time_cond_proj_dim)}

        def student(x_t, t):
            return family.predict(x_t, t, text, **guidance)

        def target(x_t, t):
            with family.denoising_with(self.student if cfg.lora else self.target):
                return student(x_t, t)

        def teacher(x_t, t):
            return self.guided(x_t, t, text, 1 + w)

        return self.consistency.loss(student, target, teacher, family.latents(batch), batch, cfg.num_ddim_timesteps)

    def after_step(self):
        if self.moved:
            follow(self.target, self.student, self.cfg.target_decay)

    @property
    def lcm(self):
        """Settings of the sampler, whose timesteps have to be those that were learnt."""
        return {"original_inference_steps": self.cfg.num_ddim_timesteps, "timestep_scaling": self.cfg.timestep_scaling}

    def sampler(self):
        return lcm_scheduler(self.family.scheduler, **self.lcm)

    @property
    def shown_guidance(self):
        return self.cfg.shown_guidance

    def pipeline(self):
        return self.family.pipeline(scheduler=self.sampler())

    def export(self, out):
        sampling = Sampling(self.cfg.validation_inference_steps, self.shown_guidance)
        return self.save(out, sampling._replace(lcm=self.lcm) if self.cfg.lora else sampling, self.sampler())
