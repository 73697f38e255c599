"""What recipes on a text-to-image base share: the data, the loss and the previews.

The loss is that of latent diffusion (Rombach et al. 2022, equation 2), with conditioning tau(y):

    L = E || eps - eps_theta(z_t, t, tau(y)) ||^2

or its form for velocity or image where the base regresses those. A method chooses which weights train.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune import __version__
from sdtune.data import Images, Mixture, Shards, open_images, open_stream
from sdtune.data.further import NOTHING, Further, ImagePrompt
from sdtune.data.text_to_image import text_to_image_dataset
from sdtune.diffusion.objective import denoising_loss
from sdtune.models import adapters, attach, families
from sdtune.models.prompt_embeddings import Reading
from sdtune.models.prompts import check_negative, check_prompts
from sdtune.recipes.recipe import Recipe
from sdtune.run.precision import dtype_of
from sdtune.run.public_name import public_name
from sdtune.sampling.generate import generate


class FineTune(Recipe):
    """A recipe whose base is a text-to-image model.

    A subclass makes parts of the base submodules of its own (``add_part``), by the names that the base gives them, and
    ``trained`` lists those that train, for the learning rates and for the artefact.
    """

    repeats = True

    def __init__(self, cfg: Any, device: torch.device):
        super().__init__(cfg, device)
        self.images = self.load_images()
        self.family = families.load(cfg, device, dtype_of(cfg))
        self.trained: dict[str, nn.Module] = {}
        self.starts: dict[str, dict[str, torch.Tensor]] = {}
        self.lora_plus_ratio = 1.0

    def add_part(self, name: str, trains: bool = True) -> Any:
        """A part of the base, now a submodule of that name; ``trains`` lists it in ``trained``."""
        part = self.family.retain(name)
        self.add_module(name, part)
        if trains:
            self.trained[name] = part
        return part

    def train_adapters(self) -> None:
        """Adapters on the denoiser, and with ``--train-text-encoder`` on the text encoders that may train."""
        cfg, family = self.cfg, self.family
        for name in (family.denoiser_name, *(family.encoders_to_train() if cfg.train_text_encoder else ())):
            modules = family.adapted_modules(name, cfg.target_modules)
            self.starts[name] = adapters.add_adapter(self.add_part(name), cfg, modules, name)
        self.lora_plus_ratio = cfg.lora_plus_ratio
        if cfg.init_adapter:
            attach.initialise(cfg.init_adapter, self.trained)

    def train_all_weights(self, text_encoders: bool = False) -> None:
        """Every weight of the denoiser, and of the text encoders that may train, where they are asked for."""
        family = self.family
        for name in (family.denoiser_name, *(family.encoders_to_train() if text_encoders else ())):
            unfreeze(self.add_part(name), family.unused_layers(name))

    @property
    def trains_text(self) -> bool:
        """Whether text embeddings change during the run, so that they cannot be cached."""
        return any(p.requires_grad for name, p in self.named_parameters() if name.startswith("text_encoder"))

    @property
    def further(self) -> Further:
        """What a sample brings beside picture, caption and noise."""
        return NOTHING

    def load_images(self) -> Images | Mixture | Shards:
        return open_images(self.cfg, paired=self.further.paired)

    def dataset(self, group, log):
        cfg, window = self.cfg, self.family.window
        check_prompts("--validation-prompt", cfg.validation_prompt, window, log, cfg.prompt_weights)
        check_prompts("--negative-prompt", [cfg.negative_prompt], window, log, cfg.prompt_weights)
        check_negative(cfg.negative_prompt, cfg.validation_guidance_scale, "--negative-prompt", log)
        stream = open_stream(self.cfg, self.images, group, paired=self.further.paired)
        return text_to_image_dataset(self.cfg, self.family, stream, log, self.trains_text, self.further)

    def forward(self, batch):
        x0, text = self.family.latents(batch), self.family.conditioning(batch)
        return denoising_loss(self.family.objective, lambda x_t, t: self.family.predict(x_t, t, text), x0, batch)

    def save_adapters(self, out: Path) -> Path:
        """Write the adapters to ``out`` as one file; returns its path."""
        return adapters.save_adapter(out, self.trained, self.provenance(), self.family.pipeline_class, self.starts)

    def parameter_groups(self):
        return [group for name in self.trained for group in self.groups_of(name)]

    def groups_of(self, name: str) -> list[dict[str, Any]]:
        """What trains of a part; with LoRA+ in two groups, the second of which is B."""
        cfg, ratio = self.cfg, self.lora_plus_ratio
        rate = (self.of_text(name) and cfg.text_encoder_lr) or cfg.learning_rate
        trained = {n: p for n, p in self.trained[name].named_parameters() if p.requires_grad}
        if ratio == 1:
            return [{"params": list(trained.values()), "lr": rate}]
        of_b = [n for n in trained if ".lora_B." in n]
        others = [p for n, p in trained.items() if n not in of_b]
        return [{"params": others, "lr": rate}, {"params": [trained[n] for n in of_b], "lr": rate * ratio}]

    def of_text(self, part: str) -> bool:
        """Whether a part is a text encoder; only methods that may train one have a rate for it."""
        return part in self.family.encoders

    image_guidance_scale: float | None = None
    """How closely previews keep to the image that they edit; ``None`` for methods that edit none."""

    def pipeline(self) -> Any:
        """What draws the previews."""
        return self.family.pipeline()

    @property
    def shown_steps(self) -> int:
        """The number of steps in which the sample grids are drawn."""
        return int(self.cfg.validation_inference_steps)

    @property
    def shown_guidance(self) -> float:
        """The guidance scale of the sample grids."""
        return float(self.cfg.validation_guidance_scale)

    def sample(self, prompts, seeds):
        """With images that go with the prompts, what is drawn has their size."""
        cfg, family = self.cfg, self.family
        given = [prompt.images for prompt in prompts if isinstance(prompt, ImagePrompt)]
        with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
            pipe = self.pipeline()
            pipe.vae.enable_slicing()  # the memory that one image takes, beside the optimizer's
            images = generate(
                pipe,
                list(map(str, prompts)),
                seeds,
                steps=self.shown_steps,
                guidance_scale=self.shown_guidance,
                negative_prompt=cfg.negative_prompt,
                width=None if given else cfg.resolution,
                height=None if given else cfg.resolution,
                reading=Reading(cfg.long_prompts, cfg.prompt_weights),
                images=given,
                image_guidance_scale=self.image_guidance_scale,
            )
        family.unload_frozen()
        return images

    def provenance(self) -> dict[str, Any]:
        """Facts about the run that its artefact carries."""
        base = public_name(self.cfg.model)
        return {"version": __version__, "base": base, "revision": self.cfg.revision, "seed": self.cfg.seed}


def unfreeze(module: nn.Module, but: str | None = None) -> nn.Module:
    """The module in fp32, training: updates in half precision would round to nothing.

    Args:
        but: regular expression on the names of parameters that stay frozen, since no gradient reaches them.
    """
    module.float()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (but and re.match(but, name)))
    return module
