"""DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation (Ruiz et al. 2022, equation 2).

    L = E [ w_t  || x_theta(a_t x + s_t eps, c) - x ||^2
            + lambda w_t' || x_theta(a_t' x_pr + s_t' eps', c_pr) - x_pr ||^2 ]

x are images of the subject, captioned with a rare word; x_pr are images of its class that the base generated, which
keep the class as it was (prior preservation). Positions of the run alternate between them, so each makes up half of the
samples whatever the batch, and the loss of a step is the mean over both halves. All weights train, or adapters (LoRA),
or adapters and the vectors of a new word (pivotal tuning; Roich et al. 2021).
"""

import torch

from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.data import Mixture, load_images
from sdtune.models import new_token
from sdtune.models.formats import embedding
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.recipes.class_images import class_images
from sdtune.recipes.finetune import FineTune


class DreamBooth(FineTune):
    Config = DreamBoothConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.add_part(self.family.denoiser_name, trains=False)
        if cfg.placeholder_token:  # so that a mistake in the word is reported before images are generated
            encoders = {name: self.add_part(name, trains=False) for name in self.family.encoders_for_a_word()}
            tokenizers = self.family.tokenizers_of(encoders)
            starts = new_token.start_vectors(cfg, tokenizers, encoders)
        if cfg.prior_preservation:
            self.images = Mixture(self.images, class_images(cfg, self.family, self.images))
        if cfg.lora:
            self.train_adapters()
        else:
            self.train_all_weights(cfg.train_text_encoder)
        self.word = None
        if cfg.placeholder_token:
            self.word = new_token.add_word(cfg.placeholder_token, tokenizers, encoders, starts)

    def load_images(self):
        cfg = self.cfg
        images = load_images(cfg, default_caption=cfg.instance_prompt, leave_out=cfg.class_data)
        return new_token.require_word(cfg.placeholder_token, images) if cfg.placeholder_token else images

    def forward(self, batch):
        prior = batch["part"] == 1
        loss = super().forward(batch) * torch.where(prior, self.cfg.prior_loss_weight, 1.0)
        return (loss, self.word.figures(len(loss))) if self.word else loss

    def parameter_groups(self):
        cfg, ends = self.cfg, dict.fromkeys(self.trained, self.cfg.unet_frac)
        ends |= {name: cfg.text_encoder_frac for name in self.trained if self.of_text(name)}
        groups = [group | {"stop_fraction": end} for name, end in ends.items() for group in self.groups_of(name)]
        if self.word:  # its rows are in the text encoders
            rows, rate = list(self.word.rows.values()), cfg.placeholder_lr or cfg.learning_rate
            for group in groups:
                group["params"] = [p for p in group["params"] if all(p is not row for row in rows)]
            groups.append({"params": rows, "lr": rate, "stop_fraction": cfg.placeholder_frac})
        return groups

    def export(self, out):
        if not self.cfg.lora:
            return write_pipeline(out, self.family.fp32_pipeline())
        files = [self.save_adapters(out)]
        if self.word:
            files.append(embedding.save(out, self.cfg.placeholder_token, self.word.rows, self.provenance()))
        return files
