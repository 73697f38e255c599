"""InstructPix2Pix: Learning to Follow Image Editing Instructions (Brooks et al. 2023, equations 1 and 3).

    L = E || eps - eps_theta(z_t, t, E(c_I), c_T) ||^2

The latent of the image before the edit, E(c_I), joins the noised one in further channels of the first layer, which
start at zero. Instruction and image are dropped now and then, alone and together, so that sampling can be guided by
each.
"""

import torch

from sdtune.config.fields import flag
from sdtune.config.methods.instruct_pix2pix import InstructPix2PixConfig
from sdtune.data.further import Further, FurtherImage
from sdtune.diffusion.objective import denoising_loss
from sdtune.models.networks import reshaped
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.recipes.finetune import FineTune

DROPOUT = "conditioning dropout"


class InstructPix2Pix(FineTune):
    Config = InstructPix2PixConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        if self.family.edit_pipeline is None:
            raise self.family.lacks("InstructPix2Pix")
        base = self.family.denoiser
        wider = reshaped(base, in_channels=2 * base.config.in_channels)
        self.family.replace(self.family.denoiser_name, wider.requires_grad_(False))
        self.train_all_weights()

    @property
    def further(self):
        option = "original_image_column"
        original = FurtherImage(self.cfg.original_image_column, flag(option), encoded=True)
        return Further({"original": original}, draws=(DROPOUT,))

    def dataset(self, group, log):
        self.nothing = self.family.encode([""])
        return super().dataset(group, log)

    def forward(self, batch):
        family, text = self.family, self.family.conditioning(batch)
        image, text = self.dropped(family.source_latents(batch["original"]), text, batch[DROPOUT])

        def predict(x_t, t):
            return family.predict(torch.cat([x_t, image], 1), t, text)

        return denoising_loss(family.objective, predict, family.latents(batch), batch)

    def dropped(self, image, text, u):
        """Without the instruction where u < 2p, and without the image where p <= u < 3p."""
        p = self.cfg.conditioning_dropout
        without_text, without_image = u < 2 * p, (p <= u) & (u < 3 * p)
        nothing = {name: tensor.to(u.device) for name, tensor in self.nothing.items()}
        text = {
            name: torch.where(without_text.view(-1, *[1] * (x.ndim - 1)), nothing[name], x) if name in nothing else x
            for name, x in text.items()
        }
        return torch.where(without_image[:, None, None, None], 0.0, image), text

    @property
    def image_guidance_scale(self):
        return self.cfg.validation_image_guidance_scale

    def pipeline(self):
        return self.family.pipeline(self.family.edit_pipeline)

    def export(self, out):
        return write_pipeline(out, self.family.fp32_pipeline(self.family.edit_pipeline))
