"""Reflow (Liu et al. 2022, "Flow Straight and Fast", algorithm 1): a flow whose paths are straight takes few steps.

    L = E || v_theta((1 - t) x_0 + t z, t, c) - (z - x_0) ||^2        x_0 = Euler(v, z, c), t uniform in [0, 1)

x_0 is where the base, under classifier-free guidance, carries the noise z. So the student joins each noise with the
image that the base makes of it, by a straight path, and is asked once a step: guidance is built in.
"""

import copy

import torch

from sdtune.config.methods.reflow import ReflowConfig
from sdtune.config.sections import UserError
from sdtune.diffusion.few_steps import reflow_loss
from sdtune.diffusion.rectified_flow import RectifiedFlow, sampling_shift, shifted
from sdtune.recipes.distillation import Distillation
from sdtune.run.sampling_file import Sampling


class Reflow(Distillation):
    Config = ReflowConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        family = self.family
        if not isinstance(family.objective, RectifiedFlow):
            kind = family.pipeline_class.__name__
            raise UserError(f"--model {cfg.model}: a {kind}, which is no flow; sdtune lcm distils it")
        self.takes_guidance = family.denoiser.config.get("guidance_embeds")
        if self.takes_guidance and cfg.teacher_guidance_scale:
            raise UserError(f"--teacher-guidance-scale: {cfg.model} is told its guidance; leave it out")
        self.scale = 1.0 if self.takes_guidance else cfg.teacher_guidance_scale or 4.0
        self.shift = sampling_shift(family.scheduler, family.patch)
        if cfg.lora:
            self.train_adapters()
        else:
            self.add_student(copy.deepcopy(family.denoiser))

    def forward(self, batch):
        family, text, noise = self.family, self.family.conditioning(batch), batch["noise"]
        even = torch.linspace(1, 0, self.cfg.teacher_steps + 1, device=noise.device)

        def student(x_t, t):
            return family.predict(x_t, t, text)

        def teacher(x_t, t):
            if self.scale == 1:
                with self.base():
                    return student(x_t, t)
            return self.guided(x_t, t, text, torch.full_like(t, self.scale))

        return reflow_loss(family.objective, student, teacher, batch, shifted(even, self.shift, noise))

    @property
    def shown_guidance(self):
        return self.cfg.guidance_embedding if self.takes_guidance else 1.0

    def export(self, out):
        scale = self.shown_guidance
        arguments = {name: value for name, value in self.family.guidance(scale, "").items() if isinstance(value, float)}
        call = None if arguments == {"guidance_scale": scale} else arguments
        return self.save(out, Sampling(self.cfg.validation_inference_steps, scale, call))
