"""Custom Diffusion: Multi-Concept Customization of Text-to-Image Diffusion (Kumari et al. 2023, section 3.2).

    L = E || eps - eps_theta(z_t, t, tau(y(v))) ||^2        W_k and W_v of the cross-attention and v train, nothing else

Keys and values are all that reads the text. Each subject has a new word v beside the name of its class, and images of
the class keep what the name meant. Several subjects take turns: positions of the run show one after the other, and
after them their classes.
"""

from pathlib import Path

import torch

from sdtune.config.methods.custom_diffusion import CustomDiffusionConfig
from sdtune.data import Images, Mixture, load_images
from sdtune.data.concepts import Concept, read_concepts
from sdtune.models import new_token
from sdtune.models.cross_attention import save_cross_attention, train_cross_attention
from sdtune.models.formats import embedding
from sdtune.recipes.class_images import class_images
from sdtune.recipes.finetune import FineTune


class CustomDiffusion(FineTune):
    Config = CustomDiffusionConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        if not self.family.reads_text_by_cross_attention:
            raise self.family.lacks("Custom Diffusion")
        unet = self.add_part(self.family.denoiser_name)
        encoders, starts = {}, []
        if cfg.placeholder_token:  # so that a mistake in a word is reported before images are generated
            encoders = {name: self.add_part(name, trains=False) for name in self.family.encoders_for_a_word()}
            tokenizers = self.family.tokenizers_of(encoders)
            starts = new_token.starts_of_words(cfg.placeholder_token, cfg.initializer_token, tokenizers, encoders)
        if cfg.prior_preservation:
            classes = [self.images_of_class(k, concept) for k, concept in enumerate(self.concepts)]
            self.images = Mixture(*self.subjects, *classes, subjects=len(self.subjects))
        train_cross_attention(unet, all_of_it=cfg.trained_attention == "crossattn")
        self.words = [
            new_token.add_word(word, self.family.tokenizers_of(encoders), encoders, start)
            for word, start in zip(cfg.placeholder_token, starts, strict=True)
        ]

    # ---- data

    def load_images(self):
        cfg = self.cfg
        self.concepts = [Concept(cfg.dataset, cfg.instance_prompt)]
        if cfg.concepts_file:
            self.concepts = read_concepts(cfg.concepts_file, cfg.prior_preservation)
        self.subjects = [self.images_of(concept) for concept in self.concepts]
        return Mixture(*self.subjects, subjects=len(self.subjects)) if cfg.concepts_file else self.subjects[0]

    def images_of(self, concept: Concept) -> Images:
        cfg, of_class = self.cfg, concept.class_data_dir or self.cfg.class_data
        images = load_images(
            cfg.model_copy(update={"dataset": concept.instance_data_dir}),
            default_caption=concept.instance_prompt,
            leave_out=Path(of_class) if of_class else None,
        )
        return new_token.require_one_of(cfg.placeholder_token, images) if cfg.placeholder_token else images

    def images_of_class(self, k: int, concept: Concept) -> Images:
        cfg = self.cfg
        if not cfg.concepts_file:
            return class_images(cfg, self.family, self.subjects[k])
        changed = {
            "dataset": concept.instance_data_dir,
            "class_prompt": [concept.class_prompt] if concept.class_prompt else [],
            "class_data": Path(concept.class_data_dir) if concept.class_data_dir else None,
        }
        return class_images(cfg.model_copy(update=changed), self.family, self.subjects[k], str(k))

    # ---- the method

    def forward(self, batch):
        prior = batch["part"] >= len(self.subjects)
        loss = super().forward(batch) * torch.where(prior, self.cfg.prior_loss_weight, 1.0)
        figures = {}
        for n, word in enumerate(self.words, 1):
            own = word.figures(len(loss))
            figures |= own if len(self.words) == 1 else {f"{name}_of_word_{n}": norms for name, norms in own.items()}
        return loss, figures

    def parameter_groups(self):
        rows = [row for word in self.words for row in word.rows.values()]
        of_words = {"params": rows, "lr": self.cfg.placeholder_lr or self.cfg.learning_rate}
        return [*super().parameter_groups(), *([of_words] if rows else [])]

    def export(self, out):
        files = [save_cross_attention(out, self.trained[self.family.denoiser_name], self.provenance())]
        for k, word in enumerate(self.words):
            files.append(embedding.save(out, word.token, word.rows, self.provenance(), k))
        return files
