"""The prior of unCLIP (Ramesh et al. 2022, section 2.2; Kandinsky 2.2): from a caption to a CLIP embedding of an image.

    L = E || z_theta(z_t, t, y) - z ||^2        z = (f(x) - mu) / sigma        z_t = a_t z + s_t noise

f(x) is the image's own embedding, and mu, sigma are those of the data: pipelines scale by them what was drawn. The
network says z itself. An empty caption stands for none, since with that one the stock pipeline guides.
"""

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from torch import nn
from torch.nn.functional import cosine_similarity

from sdtune import __version__
from sdtune.config.methods.unclip_prior import PriorConfig
from sdtune.data import Stream, load_images
from sdtune.data.embedded import embedded_dataset
from sdtune.diffusion.objective import DDPM
from sdtune.models import adapters, attach
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.models.unclip import prior_pipeline, read_prior
from sdtune.recipes.recipe import Recipe
from sdtune.run.public_name import public_name
from sdtune.run.usage import PRIOR


class Prior(Recipe):
    Config = PriorConfig
    moved = ("whitening",)
    repeats = True

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.images = load_images(cfg)
        self.prior, self.scheduler, self.towers = read_prior(cfg, device)
        self.prior.requires_grad_(True)
        self.starts = {}
        if cfg.lora:
            self.starts["prior"] = adapters.add_adapter(self.prior, cfg, cfg.target_modules, "prior")
            if cfg.init_adapter:
                attach.initialise(cfg.init_adapter, {"prior": self.prior})
        for p in (self.prior.clip_mean, self.prior.clip_std):
            p.requires_grad_(False)  # parameters only in order to be saved
        self.whitening = Whitening(self.prior.clip_mean, self.prior.clip_std)
        config = self.scheduler.config
        self.objective = DDPM(self.scheduler.alphas_cumprod, config.prediction_type, cfg.snr_gamma)

    def dataset(self, group, log):
        data = embedded_dataset(Stream(self.cfg, self.images, group), self.towers, log)
        if not self.cfg.model and self.towers.device.type != "meta":
            self.whitening.set(*data.statistics())
        if data.images is None:
            self.image_encoder = self.towers.image_encoder
        if data.texts is None:
            self.text_encoder = self.towers.text_encoder
        if data.images is not None and data.texts is not None:
            self.towers.unload()
        return data

    def forward(self, batch):
        with torch.no_grad():
            f = batch["embedding"] if "embedding" in batch else self.towers.embed(batch["pixels"])
            text = batch if "states" in batch else self.towers.read(batch["ids"])
        z, t = self.whitening(f.float()), self.objective.timesteps(batch["u"])
        z_t = self.objective.noise(z, batch["noise"], t)
        pred = self.prior(z_t, t, text["embeds"], text["states"], batch["mask"]).predicted_image_embedding
        loss = self.objective.distance(pred, self.objective.target(z, batch["noise"], t))
        if self.cfg.snr_gamma:
            loss = loss * self.objective.weight(t)
        found = self.whitening.undone(self.objective.x0(z_t, pred.float(), t))
        return loss, {"cosine": cosine_similarity(found, f.float())}

    def export(self, out):
        if self.cfg.lora:
            base = public_name(self.cfg.model)
            provenance = {"version": __version__, "base": base, "revision": self.cfg.revision, "seed": self.cfg.seed}
            provenance["pipeline"] = PRIOR
            # the pipeline of a prior has no loader of its own; this one takes any part's keys as they are
            loader, parts = SD3LoraLoaderMixin, {"prior": self.prior}
            return [adapters.save_adapter(out, parts, provenance, loader, self.starts)]
        self.whitening.write(self.prior.clip_mean, self.prior.clip_std)
        files = write_pipeline(out, prior_pipeline(self.prior, self.scheduler, self.towers))
        if not any(name.endswith("_encoder") for name, _ in self.named_children()):
            self.towers.unload()
        return files


class Whitening(nn.Module):
    """Mean and standard deviation of embeddings ``[1, D]``: of the data, and kept when the run is continued."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (nn.Parameter(x.detach().clone().float(), requires_grad=False) for x in (mean, std))

    def forward(self, f):
        return (f - self.mean) / self.std

    def undone(self, z):
        return z * self.std + self.mean

    @torch.no_grad()
    def set(self, mean, std):
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-4))

    @torch.no_grad()
    def write(self, mean, std):
        mean.copy_(self.mean)
        std.copy_(self.std)
