"""A classifier of noised images at every timestep (Dhariwal & Nichol 2021, section 4): the encoder half of a UNet.

Residual blocks modulated by the timestep (scale and shift), self-attention at some levels, and an attention pool
(Radford et al. 2021) in place of the decoder.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn


class NoisyClassifier(ModelMixin, ConfigMixin):
    """``p(y | x_t, t)`` as logits.

    Args:
        sample_size: side of the images in pixels, or (height, width).
        in_channels: channels of the images.
        num_classes: K.
        block_out_channels: channels at each level; the next level has half the pixels along a side.
        down_block_types: ``DownBlock2D`` or ``AttnDownBlock2D`` for each level.
        attention_head_dim: channels of an attention head; ``None`` is one head.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int],
        in_channels: int,
        num_classes: int,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        layers_per_block: int = 2,
        attention_head_dim: int | None = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        first, width = block_out_channels[0], block_out_channels[-1]
        emb = 4 * first
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(first, emb)
        shared = {
            "temb_channels": emb,
            "resnet_eps": norm_eps,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "resnet_time_scale_shift": "scale_shift",
            "dropout": dropout,
        }
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers_per_block,
                in_channels=before,
                out_channels=channels,
                add_downsample=level < len(block_out_channels) - 1,
                attention_head_dim=attention_head_dim or channels,
                downsample_padding=0,
                **shared,
            )
            for level, (kind, before, channels) in enumerate(
                zip(down_block_types, (first, *block_out_channels), block_out_channels, strict=False)
            )
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=width,
            attention_head_dim=attention_head_dim or width,
            attn_groups=norm_num_groups,
            **shared,
        )
        self.norm = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        height, breadth = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        halvings = len(block_out_channels) - 1
        self.pool = AttentionPool(
            (height >> halvings) * (breadth >> halvings), width, width // (attention_head_dim or width), num_classes
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` at timesteps ``[B]``."""
        temb = self.time_embedding(self.time_proj(t.expand(len(x_t))).to(self.dtype))
        h = self.conv_in(x_t)
        for block in self.down_blocks:
            h, _ = block(h, temb)
        h = nn.functional.silu(self.norm(self.mid_block(h, temb)))
        return self.pool(h)


class AttentionPool(nn.Module):
    """The mean of all places asks the places, and itself, what the image shows (Radford et al. 2021, section 2.4)."""

    def __init__(self, places: int, width: int, heads: int, outputs: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(places + 1, width) / width**0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, outputs]``."""
        tokens = h.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.places
        pooled, _ = self.attention(tokens[:, :1], tokens, tokens, need_weights=False)
        return self.out(pooled[:, 0])
