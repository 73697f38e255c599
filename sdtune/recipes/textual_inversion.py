"""Textual inversion: An Image is Worth One Word (Gal et al. 2022, equation 2).

    v* = argmin_v  E || eps - eps_theta(z_t, t, tau(y(v))) ||^2

A new word gets vectors v of its own in each text encoder's table; nothing else trains. Each time an image is used, a
template such as "a photo of {}", drawn at random, captions it with the new word.
"""

from sdtune.config.methods.textual_inversion import TextualInversionConfig
from sdtune.data import load_images, with_captions
from sdtune.models import new_token
from sdtune.models.formats import embedding
from sdtune.recipes.caption_templates import filled
from sdtune.recipes.finetune import FineTune


class TextualInversion(FineTune):
    Config = TextualInversionConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.add_part(self.family.denoiser_name, trains=False)
        encoders = {name: self.add_part(name, trains=False) for name in self.family.encoders_for_a_word()}
        tokenizers = self.family.tokenizers_of(encoders)
        starts = new_token.start_vectors(cfg, tokenizers, encoders)
        self.word = new_token.add_word(cfg.placeholder_token, tokenizers, encoders, starts)

    def load_images(self):
        cfg = self.cfg
        if cfg.caption or cfg.caption_column:
            return new_token.require_word(cfg.placeholder_token, load_images(cfg))
        return with_captions(load_images(cfg, captions=False), filled(cfg))

    def forward(self, batch):
        loss = super().forward(batch)
        if self.cfg.norm_weight:
            loss = loss + self.cfg.norm_weight * self.word.deviation()
        return loss, self.word.figures(len(loss))

    def parameter_groups(self):
        return [{"params": list(self.word.rows.values()), "lr": self.cfg.learning_rate}]

    def export(self, out):
        return [embedding.save(out, self.cfg.placeholder_token, self.word.rows, self.provenance())]
