"""The autoencoder of latent diffusion (Rombach et al. 2022, appendix G; Esser et al. 2021, equations 5 to 7).

    L_rec = |x - D(z)| + w_p P(x, D(z)) + w_kl KL(q(z|x) || N(0, 1))        z ~ q(z|x) = E(x)
    L_G = L_rec + lambda w_d L_adv(D(z)),  L_adv = -d(D(z))        L_d = hinge(d(x), d(D(z)))
    lambda = |grad L_rec| / |grad L_adv|, both at the decoder's last layer

Unless the encoder trains too, the latents stay those that a denoiser was trained on. One backward pass trains both
players: in the generator's loss the discriminator's weights are constants, and in the discriminator's the picture is.
"""

import torch
from torch.distributed.tensor import DTensor

from sdtune.config.methods.autoencoder import AutoencoderConfig
from sdtune.config.sections import UserError
from sdtune.config.untrusted import echo
from sdtune.data import open_images, open_stream
from sdtune.data.autoencoding import autoencoding_dataset, check_shapes
from sdtune.data.further import to_image
from sdtune.data.images import to_tensor
from sdtune.models.autoencoders import downscale, read_autoencoder
from sdtune.models.discriminator import PatchDiscriminator, adaptive_weights, hinge
from sdtune.models.perceptual import perceptual_distance, psnr
from sdtune.models.pipeline_folder import write_module
from sdtune.recipes.recipe import Recipe
from sdtune.run.precision import precision_of

MEASURED = 200
"""Most images on which the scale of new latents is estimated."""


class Autoencoder(Recipe):
    Config = AutoencoderConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        if precision_of(cfg) == "fp16":
            raise UserError("--mixed-precision fp16: an autoencoder's activations exceed what fp16 holds; bf16 works")
        self.images = open_images(cfg, captions=False)
        self.vae = read_autoencoder(cfg, device).requires_grad_(True)
        self.latent = self.vae.config.latent_channels, downscale(self.vae)
        check_shapes(cfg, self.latent[1])
        if not cfg.train_encoder:
            for part in filter(None, (self.vae.encoder, self.vae.quant_conv)):
                part.requires_grad_(False)
        if cfg.perceptual_scale:
            self.perceptual = perceptual_distance(cfg.perceptual_network)
        if cfg.disc_scale:
            self.discriminator = PatchDiscriminator(3, cfg.disc_channels, cfg.disc_layers)
            self.vae.decoder.conv_out.register_forward_pre_hook(self.keep_features)

    def dataset(self, group, log):
        stream = open_stream(self.cfg, self.images, group)
        shown = self.cfg.validation_image or self.cfg.num_validation_images
        self.data = autoencoding_dataset(self.cfg, stream, self.latent, log, shown)
        return self.data

    def forward(self, batch):
        cfg, x = self.cfg, batch["pixels"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and cfg.train_encoder):
            posterior = self.vae.encode(x).latent_dist
        z = posterior.mean
        if cfg.sample_posterior:
            z = z + posterior.std * batch["posterior_noise"]
        y = self.vae.decode(z).sample
        error = y - x
        loss = (error.abs() if cfg.rec_loss == "l1" else error.square()).flatten(1).mean(1)
        figures = {"reconstruction": loss, "psnr": psnr(y, x)}
        if cfg.perceptual_scale:
            figures["perceptual"] = self.perceptual(y, x)
            loss = loss + cfg.perceptual_scale * figures["perceptual"]
        if cfg.disc_scale:
            adversarial, more = self.adversarial(x, y, loss)
            loss, figures = loss + adversarial, figures | more
        if cfg.train_encoder:
            figures["kl"] = posterior.kl() / x[0].numel()
            loss = loss + cfg.kl_scale * figures["kl"]
        return loss, figures

    def adversarial(self, x, y, reconstruction):
        """What the adversarial game adds to the loss of each image ``[B]``, and its figures."""
        fooled = self.discriminator.fooled(y)
        real, fake = self.discriminator(x), self.discriminator(y.detach())
        loss = hinge(real, fake)
        figures = {"disc_loss": loss, "real": real.flatten(1).mean(1), "fake": fake.flatten(1).mean(1)}
        features, self.features = self.features, None
        if not torch.is_grad_enabled():
            return torch.zeros_like(loss), figures  # a held-out loss that the discriminator lowers says nothing
        if self.step < self.cfg.disc_start:
            return loss, figures
        wanted, got = (torch.autograd.grad(part.sum(), y, retain_graph=True)[0] for part in (reconstruction, fooled))
        weights = adaptive_weights(features, wanted, got, self.vae.decoder.conv_out.kernel_size[0])
        return self.cfg.disc_scale * weights * fooled + loss, figures | {"adaptive_weight": weights}

    def keep_features(self, module, args):
        """The input of the decoder's last layer, from which the gradient of its weights is computed."""
        self.features = args[0].detach()

    def parameter_groups(self):
        cfg, rate = self.cfg, self.cfg.learning_rate
        if any(isinstance(p, DTensor) for p in self.parameters()):
            raise UserError("accelerate config: an autoencoder is not cut into slices (FSDP); leave FSDP out")
        groups = [{"params": [p for p in self.vae.parameters() if p.requires_grad], "lr": rate}]
        if cfg.disc_scale:
            groups.append({"params": list(self.discriminator.parameters()), "lr": cfg.disc_learning_rate or rate})
        return groups

    @torch.no_grad()
    def sample(self, prompts, seeds):
        found = []
        for prompt in prompts:
            (image,) = prompt.images
            x = to_tensor(image, *image.size, 0.5, 0.5, False, "lanczos")[None].to(self.vae.device)
            found.append(to_image(self.vae.decode(self.vae.encode(x).latent_dist.mean).sample[0].float().cpu()))
        return found

    def export(self, out):
        if self.cfg.train_encoder:
            self.scale_latents()
        return write_module(out, self.vae)

    @torch.no_grad()
    def scale_latents(self):
        """Have pipelines scale the new latents to a variance of 1, as denoisers want them (Rombach et al. 2022).

        Denoisers see samples: the variance of the means, and that around them.
        """
        count = min(MEASURED, self.data.stream.epoch_length)
        items = (self.data[k]["pixels"][None].to(self.vae.device) for k in range(count))
        found = [self.vae.encode(x).latent_dist for x in items]
        z, around = torch.cat([d.mean.flatten() for d in found]), torch.cat([d.var.flatten() for d in found])
        shift = None if self.vae.config.shift_factor is None else z.mean().item()
        factor = (z.var() + around.mean()).rsqrt().item()
        # those of each channel, which a base may have, were those of the old latents
        self.vae.register_to_config(scaling_factor=factor, shift_factor=shift, latents_mean=None, latents_std=None)
        echo(f"scaling factor of the new latents: {factor:.5f}, of {count} images")
