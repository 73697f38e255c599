"""A recipe of one's own that trains every weight of the denoiser, and leaves a whole pipeline."""

from pathlib import Path
from typing import ClassVar

import torch

from sdtune.config.sections import BaseOptions, Captions, Data, Denoising, Hub, Model, Optim, Preview, Prompts, Run
from sdtune.data import load_images
from sdtune.models import families
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.recipes.lora import Lora
from sdtune.recipes.recipe import Recipe


class Own(Lora):
    """All of the UNet."""

    class Config(Denoising, BaseOptions, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
        method: ClassVar[str] = "own"
        entry: ClassVar[str] = ""

        output_dir: Path = Path("runs/own")
        train_text_encoder: ClassVar[bool] = False

    parameter_groups = Recipe.parameter_groups

    def __init__(self, cfg, device):
        Recipe.__init__(self, cfg, device)
        self.images = load_images(cfg)
        self.family = families.load(cfg, device, torch.float32)
        self.trained = {}
        self.unet = self.family.retain("unet").requires_grad_(True)

    def forward(self, batch):
        loss = super().forward(batch)
        norm = self.unet.conv_in.weight.detach().norm()
        return loss, {"first_norm": norm.expand(len(loss)), "three": torch.full_like(loss, 3)}

    def export(self, out):
        return write_pipeline(out, self.family.pipeline(), {"notes/about.txt": b"by a test\n"})
