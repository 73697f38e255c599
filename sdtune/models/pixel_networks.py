"""What the options of a model of pixels say of its network, as arguments of diffusers' UNets."""

from collections.abc import Sequence
from typing import Any

from sdtune.config.sections import ImageSize, UserError


def sample_size(cfg: ImageSize) -> int | tuple[int, int]:
    """The size of the images as a network records it: the side of a square, or (height, width)."""
    width, height = cfg.image_size
    return width if width == height else (height, width)


def sides_of(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of the images of a network, from what it records."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def levels(cfg: Any) -> dict[str, Any]:
    """The options of Network as arguments of ``UNet2DModel``, the rest as in the networks of Ho et al. 2020."""
    sides = [min(cfg.image_size) >> level for level in range(len(cfg.block_out_channels))]
    attends = ["Attn" if side in cfg.attention_resolutions else "" for side in sides]
    widths = [n for n, kind in zip(cfg.block_out_channels, attends, strict=True) if kind]
    widths.append(cfg.block_out_channels[-1])  # the block in the middle attends as well
    if odd := [n for n in widths if n % (cfg.attention_head_dim or n)]:
        raise UserError(
            f"--attention-head-dim {cfg.attention_head_dim} does not divide {odd[0]} of --block-out-channels"
        )
    return {
        "block_out_channels": tuple(cfg.block_out_channels),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in attends),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(attends)),
        "layers_per_block": cfg.layers_per_block,
        "attention_head_dim": cfg.attention_head_dim,
        "norm_num_groups": cfg.norm_num_groups,
        "dropout": cfg.dropout,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }


def residual_blocks(cfg: Any) -> dict[str, Any]:
    """The options of ResidualBlocks as arguments of ``UNet2DModel``; those that say nothing new are left out."""
    chosen: dict[str, Any] = {}
    if cfg.resnet_time_scale_shift != "default":
        chosen["resnet_time_scale_shift"] = cfg.resnet_time_scale_shift
    if cfg.resblock_updown:  # levels with attention ask for it by an argument, the others by another block
        kinds = levels(cfg)
        chosen |= {"downsample_type": "resnet", "upsample_type": "resnet"}
        for name, plain, resnet in (
            ("down_block_types", "DownBlock2D", "ResnetDownsampleBlock2D"),
            ("up_block_types", "UpBlock2D", "ResnetUpsampleBlock2D"),
        ):
            chosen[name] = tuple(resnet if kind == plain else kind for kind in kinds[name])
    return chosen


def check_halvings(cfg: Any, count: int) -> None:
    """Raises: UserError when the images cannot be halved from level to level of ``count``."""
    least = 2 ** (count - 1)
    sizes = {"width": cfg.width, "height": cfg.height} if cfg.width else {"resolution": cfg.resolution}
    if cfg.buckets:
        sizes["bucket_step"] = cfg.bucket_step
    for option, pixels in sizes.items():
        if pixels % least:
            raise UserError(
                f"--{option.replace('_', '-')} {pixels}: this network halves it {count - 1} times, so it wants a "
                f"multiple of {least}, or fewer --block-out-channels"
            )
