"""Contrastive language-image pre-training (Radford et al. 2021, figure 3), from nothing or continued.

    s_ij = exp(tau) f(x_i) . g(y_j)        L = (CE(s, q) + CE(s^T, q)) / 2        f, g unit vectors

All pictures and captions of an optimizer step are compared, also those of other processes. Captions that are equal are
no negatives of each other: q is uniform over the captions equal to the right one (Yang et al. 2022). A batch may be
encoded in chunks: the backward pass encodes each again, with the gradient that the whole step gave its embeddings, so
the sum is that of the whole batch (GradCache; Gao et al. 2021).

With ``--noised`` it sees pictures as they are on the way of a diffusion (Nichol et al. 2021, section 3.2).
"""

import math

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from sdtune.config.methods.clip import ClipConfig
from sdtune.config.sections import UserError
from sdtune.data import Stream, load_images
from sdtune.data.captioned import captioned_dataset
from sdtune.models.clip import Clip as Parts
from sdtune.models.clip import read_clip, save_clip
from sdtune.recipes.recipe import Recipe

MAX_SCALE = 100.0
"""Most by which cosines are multiplied (Radford et al. 2021, section 2.5)."""


class Clip(Recipe):
    Config = ClipConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        if cfg.gradient_accumulation_steps > 1:
            raise UserError(
                f"--gradient-accumulation-steps {cfg.gradient_accumulation_steps}: every picture of a step is compared "
                f"with every caption; give --train-batch-size {cfg.train_batch_size * cfg.gradient_accumulation_steps} "
                f"--chunk-size {cfg.train_batch_size}, which needs as little memory"
            )
        self.images = load_images(cfg)
        parts = read_clip(cfg, device)
        self.clip, self.parts = parts.model.requires_grad_(True), parts._replace(model=None)
        for name, values in (("mean", parts.mean), ("std", parts.std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def dataset(self, group, log):
        if group < 2:
            raise UserError("--train-batch-size 1: a picture needs other captions beside its own; give at least 2")
        window = Parts(self.clip, self.parts.tokenizer).window
        stream = Stream(self.cfg, self.images, group)
        return captioned_dataset(stream, self.parts.tokenizer, window, log, self.cfg.noised)

    def forward(self, batch):
        x, tokens = batch["pixels"], batch["tokens"]
        if self.cfg.noised:
            x = noised(x, batch["noise"], batch["u"])
        size = self.cfg.chunk_size or len(x)
        parts = list(zip(x.split(size), tokens.split(size), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            made = [checkpoint(self.embeddings, *part, use_reentrant=False) for part in parts]
        else:
            made = [self.embeddings(*part) for part in parts]
        own = torch.cat(made)
        together = self.training and distributed.is_initialized() and distributed.get_world_size() > 1
        every, all_tokens = (Gathered.apply(own), gathered(tokens)) if together else (own, tokens)
        # shapes without values have no autocast of their own
        with torch.autocast("cpu" if own.is_meta else own.device.type, enabled=False):
            return contrastive_loss(own, every, tokens, all_tokens, self.clip.logit_scale.exp())

    def embeddings(self, x, tokens):
        """Unit embeddings of pictures and captions in fp32: ``[B, 2, D]``."""
        f = self.clip.get_image_features(pixel_values=(x / 2 + 0.5 - self.mean) / self.std).pooler_output
        g = self.clip.get_text_features(input_ids=tokens).pooler_output
        return normalize(torch.stack([f, g], 1).float(), dim=2)

    @torch.no_grad()
    def after_step(self):
        self.clip.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def parameter_groups(self):
        """Gains, biases and the temperature do not decay (Radford et al. 2021, section 2.5)."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            raise UserError("accelerate config: a CLIP is not cut into slices (FSDP); leave FSDP out")
        weights = [p for p in self.clip.parameters() if p.ndim > 1]
        others = [p for p in self.clip.parameters() if p.ndim < 2]
        rate = self.cfg.learning_rate
        return [{"params": weights, "lr": rate}, {"params": others, "lr": rate, "weight_decay": 0.0}]

    def export(self, out):
        return save_clip(out, self.parts._replace(model=self.clip), self.cfg.noised)


def noised(x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
    """``cos(pi u / 2) x + sin(pi u / 2) noise``: a cosine schedule (Nichol & Dhariwal 2021), from clean to pure noise.

    Args:
        x, noise: ``[B, C, H, W]``.
        u: uniform in [0, 1), float64 ``[B]``.
    """
    angle = (math.pi / 2 * u).view(-1, 1, 1, 1)
    return angle.cos().to(x) * x + angle.sin().to(x) * noise


def contrastive_loss(
    own: Tensor, every: Tensor, tokens: Tensor, all_tokens: Tensor, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair of this process ``[B]``, and figures: whether its best match among all is right.

    Args:
        own: unit embeddings of pictures and captions ``[B, 2, D]``; ``every``: those of the step ``[N, 2, D]``.
        tokens: of the captions ``[B, L]``; ``all_tokens``: ``[N, L]``.
        scale: factor of the cosines.
    """
    same = (tokens[:, None] == all_tokens[None]).all(2).to(own.dtype)
    target = same / same.sum(1, keepdim=True)
    logits = [scale * own[:, 0] @ every[:, 1].T, scale * own[:, 1] @ every[:, 0].T]
    losses = [-(target * one.log_softmax(1)).sum(1) for one in logits]
    right = [same.gather(1, one.argmax(1, keepdim=True))[:, 0] for one in logits]
    figures = {"text_of_image": right[0], "image_of_text": right[1], "scale": scale.expand(len(own))}
    return (losses[0] + losses[1]) / 2, figures


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in their order: ``[B, ...]`` -> ``[N, ...]``."""
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class Gathered(torch.autograd.Function):
    """As `gathered`; the gradient of a row is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return gathered(x)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.contiguous()
        distributed.all_reduce(total)
        first = distributed.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
