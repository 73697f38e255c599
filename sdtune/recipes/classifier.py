"""The classifier of classifier guidance (Dhariwal & Nichol 2021, section 4), trained on images of every noise level.

    L = E -log p_phi(y | x_t, t)        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t uniform

The gradient of its log-probability with respect to x_t is what steers a diffusion model of the same noise schedule.
"""

from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy

from sdtune.config.methods.classifier import ClassifierConfig
from sdtune.data import Stream, load_images
from sdtune.data.pixel_dataset import choose_mode, class_names, pixel_dataset
from sdtune.diffusion import noise_schedule
from sdtune.diffusion.objective import DDPM
from sdtune.models import pixel_models
from sdtune.recipes.recipe import Recipe

PARTS = 5
"""Into how many equal parts the timesteps are divided, each of which has an accuracy of its own."""


class Classifier(Recipe):
    Config = ClassifierConfig
    repeats = True

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.scheduler = noise_schedule.classifier_scheduler(cfg)
        self.process = DDPM(self.scheduler.alphas_cumprod)
        self.images = load_images(cfg, captions=False, class_column=cfg.class_column)
        self.mode = choose_mode(cfg, self.images, None)
        self.classes = class_names(cfg, self.images)
        self.classifier = pixel_models.classifier(cfg, len(self.mode), len(self.classes))

    def dataset(self, group, log):
        return pixel_dataset(self.cfg, Stream(self.cfg, self.images, group, self.mode), log, self.classes)

    def forward(self, batch):
        t, y = self.process.timesteps(batch["u"]), batch["label"]
        logits = self.classifier(self.process.noise(batch["pixels"], batch["noise"], t), t).float()
        return cross_entropy(logits, y, reduction="none"), self.accuracy(logits, y, t)

    def accuracy(self, logits, y, t):
        """Whether each image is classified right, by part of the timesteps: ``[B]`` each, NaN in the other parts."""
        right, T = (logits.argmax(1) == y).float(), len(self.process.alphas_cumprod)
        edges = [T * part // PARTS for part in range(PARTS + 1)]
        return {
            f"accuracy_t{low}_{high - 1}": right.where((low <= t) & (t < high), torch.nan)
            for low, high in pairwise(edges)
        }

    def export(self, out):
        return pixel_models.save_classifier(out, self.classifier, self.scheduler, self.classes)
