"""On Distillation of Guided Diffusion Models (Meng et al. 2023): one student for a range of guidance, in few steps.

    first phase    L = max(a_t^2 / s_t^2, 1) || x_theta(z_t, t, w, c) - [(1 + w) x(z_t, t, c) - w x(z_t, t)] ||^2
    each further   progressive distillation of the student of the phase before, which is told w too (algorithm 2)

x is the base, w a guidance that is drawn anew for each image and told to the student, so that a step asks once.
"""

import copy

from diffusers import DDIMScheduler

from sdtune.config.methods.guidance_distillation import GuidanceDistillationConfig
from sdtune.config.sections import UserError
from sdtune.diffusion.few_steps import dividing, follow, guidance_embedding, guidance_loss, progressive_loss
from sdtune.diffusion.objective import DDPM
from sdtune.models.networks import reshaped
from sdtune.recipes.distillation import Distillation
from sdtune.run.sampling_file import Sampling


class GuidanceDistillation(Distillation):
    Config = GuidanceDistillationConfig
    moved = ("halved",)

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        family = self.family
        if not isinstance(family.objective, DDPM):
            kind = family.pipeline_class.__name__
            ways = "sdtune reflow distils those, guidance-distillation bases of DDPM"
            raise UserError(f"--model {cfg.model}: a {kind}, made by flow matching; {ways}")
        T = len(family.objective.alphas_cumprod)
        if odd := [count for count in cfg.sampling_steps if T % count]:
            fitting = ", ".join(map(str, dividing(T, odd[0])))
            raise UserError(f"--sampling-steps {odd[0]}: does not divide the base's {T} timesteps, as do {fitting}")
        self.add_student(reshaped(family.denoiser, time_cond_proj_dim=cfg.time_cond_proj_dim))
        self.halved = copy.deepcopy(self.student).requires_grad_(False)

    @property
    def phase_steps(self):
        return self.cfg.phase_steps or max(1, self.total_steps // (1 + len(self.cfg.sampling_steps)))

    def phase(self, step):
        """0 while guidance is learnt, and then the number of the halving."""
        return min(step // self.phase_steps, len(self.cfg.sampling_steps))

    def forward(self, batch):
        cfg, family, text = self.cfg, self.family, self.family.conditioning(batch)
        phase, x0 = self.phase(self.step), family.latents(batch)
        parts = cfg.sampling_steps[phase - 1] if phase else len(family.objective.alphas_cumprod)
        # What of `u` does not choose the timestep is uniform as well, and independent of it
        w = (cfg.w_min + (cfg.w_max - cfg.w_min) * (batch["u"] * parts).frac()).float()
        embedding = guidance_embedding(w, cfg.time_cond_proj_dim)

        def student(x_t, t):
            return family.predict(x_t, t, text, timestep_cond=embedding)

        def before(x_t, t):
            with family.denoising_with(self.halved):
                return student(x_t, t)

        def base(x_t, t):
            return self.guided(x_t, t, text, 1 + w)

        if not phase:
            return guidance_loss(family.objective, student, base, x0, batch)
        return progressive_loss(family.objective, student, before, x0, batch, parts)

    def after_step(self):
        if self.phase(self.step) != self.phase(self.step - 1):
            follow(self.halved, self.student, 0.0)

    @property
    def learnt(self):
        """Steps in which the student draws now: at the end of a phase, those of that phase."""
        phase, counts = self.phase(max(self.step - 1, 0)), self.cfg.sampling_steps
        return counts[phase - 1] if phase else 2 * counts[0]

    def sampler(self):
        """DDIM whose steps end where the next begins, and at the clean image: those that are learnt."""
        steps = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        return DDIMScheduler.from_config(self.family.scheduler.config, **steps)

    @property
    def shown_steps(self):
        return self.learnt

    @property
    def shown_guidance(self):
        return self.cfg.shown_guidance

    def pipeline(self):
        return self.family.pipeline(scheduler=self.sampler())

    def export(self, out):
        return self.save(out, Sampling(self.learnt, self.shown_guidance), self.sampler())
