"""Text-to-image fine-tuning: every weight of the denoiser trains (Rombach et al. 2022, equation 2).

With ``--dream`` the noise of a step holds some of the network's own error (DREAM; Zhou et al. 2023), as it will when
it samples; see ``diffusion.dream``.
"""

from sdtune.config.methods.text_to_image import TextToImageConfig
from sdtune.diffusion.objective import denoising_loss, dream
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.recipes.finetune import FineTune


class TextToImage(FineTune):
    Config = TextToImageConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.train_all_weights()

    def forward(self, batch):
        if not self.cfg.dream or not self.training:
            return super().forward(batch)
        family, text = self.family, self.family.conditioning(batch)
        x0 = family.latents(batch)

        def predict(x_t, t):
            return family.predict(x_t, t, text)

        noise = dream(family.objective, predict, x0, batch, self.cfg.dream_detail_preservation)
        return denoising_loss(family.objective, predict, x0, batch | {"noise": noise})

    def export(self, out):
        return write_pipeline(out, self.family.fp32_pipeline())
