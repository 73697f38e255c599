"""unCLIP's decoder (Ramesh et al. 2022, section 2.1; Kandinsky 2.2): from a CLIP embedding of a picture to a picture.

    L = E || target - net(z_t, t, f(x)) ||^2        z the latent of x        z_t = a_t z + s_t noise

f(x) is the picture's own embedding. A share is replaced by that of a picture that is all zeros to CLIP, with which the
stock pipeline guides. Of the network's 2C channels the first half is trained; the other is a variance. From a base that
reads text all is taken over but for the way in: an embedding becomes 32 tokens that the cross-attention looks at.
"""

import torch
from diffusers import DDPMScheduler
from diffusers.loaders import SD3LoraLoaderMixin

from sdtune import __version__
from sdtune.config.methods.image_decoder import ImageDecoderConfig
from sdtune.config.sections import UserError
from sdtune.data import Stream, load_images
from sdtune.data.decoding import decoding_dataset
from sdtune.data.images import to_tensor
from sdtune.diffusion.objective import DDPM, denoising_loss
from sdtune.models import adapters, attach
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.models.unclip_decoder import TRAINED, decoder_pipeline, encoded, read_decoder, read_towers, side_multiple
from sdtune.recipes.recipe import Recipe
from sdtune.run.public_name import public_name
from sdtune.run.usage import DECODER


class ImageDecoder(Recipe):
    Config = ImageDecoderConfig
    repeats = True

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.images = load_images(cfg, captions=False)
        self.towers = read_towers(cfg, device)
        self.decoder = read_decoder(cfg, self.towers.width, device)
        self.unet, self.movq = self.decoder.unet.requires_grad_(True), self.decoder.movq
        multiple = side_multiple(self.movq)
        if cfg.resolution % multiple:
            raise UserError(f"--resolution {cfg.resolution}: this decoder draws multiples of {multiple}")
        if cfg.buckets and cfg.bucket_step % multiple:
            raise UserError(f"--bucket-step {cfg.bucket_step}: this decoder draws multiples of {multiple}")
        self.starts = {}
        if cfg.lora:
            self.starts[TRAINED] = adapters.add_adapter(self.unet, cfg, cfg.target_modules, "UNet")
            if cfg.init_adapter:
                attach.initialise(cfg.init_adapter, {TRAINED: self.unet})
        self.objective = DDPM.of(cfg, DDPMScheduler.from_config(self.decoder.scheduler.config))

    def dataset(self, group, log):
        stream = Stream(self.cfg, self.images, group)
        self.data = decoding_dataset(self.cfg, stream, self.towers, self.movq, encoded, log)
        if self.data.known is None:
            self.image_encoder = self.towers.image_encoder
        else:
            self.towers.unload()
        return self.data

    def forward(self, batch):
        with torch.no_grad():
            z = batch["latents"] if "latents" in batch else encoded(self.movq, batch["pixels"])
            f = batch["embedding"] if "embedding" in batch else self.seen(batch["seen"], batch["dropped"])

        def predict(z_t, t):
            said = self.unet(z_t, t, None, added_cond_kwargs={"image_embeds": f}).sample
            return said.chunk(2, dim=1)[0]

        return denoising_loss(self.objective, predict, z, batch)

    def seen(self, pixels, dropped):
        """Embeddings of pictures as CLIP sees them, that of zeros where they are ``dropped`` ``[B]``."""
        return self.towers.embed(torch.where(dropped[:, None, None, None], self.towers.blank(pixels), pixels))

    @torch.no_grad()
    def sample(self, prompts, seeds):
        """Variations: the embedding of each image, drawn anew."""
        cfg, towers = self.cfg, self.towers
        pipe = decoder_pipeline(self.decoder._replace(unet=self.unet))
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            (image,) = prompt.images
            x = to_tensor(image, towers.side, towers.side, 0.5, 0.5, False, "bicubic")[None]
            found += pipe(
                image_embeds=towers.embed(x).to(self.unet.device),
                negative_image_embeds=towers.embed(towers.blank(x)).to(self.unet.device),
                height=image.height,
                width=image.width,
                num_inference_steps=cfg.validation_inference_steps,
                guidance_scale=cfg.validation_guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images
        return found

    def export(self, out):
        if self.cfg.lora:
            base = public_name(self.cfg.model)
            provenance = {"version": __version__, "base": base, "revision": self.cfg.revision, "seed": self.cfg.seed}
            provenance["pipeline"] = DECODER
            return [adapters.save_adapter(out, {TRAINED: self.unet}, provenance, SD3LoraLoaderMixin, self.starts)]
        return write_pipeline(out, decoder_pipeline(self.decoder._replace(unet=self.unet)))
