"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, equation 3), on a text-to-image denoiser.

    h = W x + (alpha / r) B A x        A ~ N(0, 1/r^2), B = 0, W frozen

The loss is the base model's own (Rombach et al. 2022, equation 2): nothing about the diffusion changes, only which
weights may move. The adapters sit inside the base's own modules, so the base is a submodule here, and frozen.
"""

from sdtune import __version__, adapters, families
from sdtune.data import Stream, load_images
from sdtune.diffusion import denoising_loss
from sdtune.methods import LoraConfig
from sdtune.precision import dtype_of
from sdtune.recipe import Recipe
from sdtune.sample import generate
from sdtune.samples import text_to_image


class Lora(Recipe):
    Config = LoraConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.images = load_images(cfg)
        self.family = families.load(cfg, device, dtype_of(cfg))
        self.unet = self.family.keep("unet")
        adapters.add_adapter(self.unet, cfg, cfg.target_modules, "UNet")
        self.trained = {"unet": self.unet}
        if cfg.train_text_encoder:
            self.text_encoder = self.family.keep("text_encoder")
            adapters.add_adapter(self.text_encoder, cfg, adapters.TEXT_ENCODER_TARGETS, "text encoder")
            self.trained["text_encoder"] = self.text_encoder
        if cfg.init_adapter:
            adapters.load_adapter(cfg.init_adapter, self.trained)

    def dataset(self, group, say):
        stream = Stream(self.cfg, self.images, group)
        return text_to_image(self.cfg, self.family, stream, say, trains_text=self.cfg.train_text_encoder)

    def forward(self, batch):
        x0, text = self.family.latents(batch), self.family.conditioning(batch)
        return denoising_loss(self.family.objective, lambda x_t, t: self.family.predict(x_t, t, text), x0, batch)

    def parameter_groups(self):
        cfg = self.cfg
        rates = {"unet": cfg.learning_rate, "text_encoder": cfg.text_encoder_lr or cfg.learning_rate}
        return [
            {"params": [p for p in part.parameters() if p.requires_grad], "lr": rates[name]}
            for name, part in self.trained.items()
        ]

    def sample(self, prompts, seeds):
        cfg, pipeline = self.cfg, self.family.pipeline()
        images = generate(
            pipeline,
            prompts,
            seeds,
            steps=cfg.validation_inference_steps,
            guidance_scale=cfg.validation_guidance_scale,
            negative_prompt=cfg.negative_prompt,
            width=cfg.resolution,
            height=cfg.resolution,
        )
        self.family.release()
        return images

    def export(self, out):
        provenance = {
            "version": __version__,
            "base": families.public_name(self.cfg.model),
            "revision": self.cfg.revision,
            "seed": self.cfg.seed,
        }
        return [adapters.save_adapter(out, self.trained, provenance, self.family.pipeline_class)]
