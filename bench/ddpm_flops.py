"""Counts what training and sampling a pixel model costs, from its network: no data, no weights, no clock.

python bench/ddpm_flops.py --config ddpm/cifar10
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdtune.config import parsing
from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.models import pixel_models

SAMPLES = 50_000  # what an FID is measured on


def forward_flops(unet: torch.nn.Module) -> int:
    """Floating-point operations of one image through the network, a multiplication and an addition counted as two."""
    channels, side = unet.config.in_channels, unet.config.sample_size
    x, t = torch.zeros(1, channels, side, side, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        unet(x, t)
    return counter.get_total_flops()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="ddpm/cifar10")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=100.0, help="TFLOP/s that the device reaches in practice")
    args = parser.parse_args()
    cfg = parsing.resolve(DdpmConfig, args.config, {}, [])
    with torch.device("meta"):
        unet = pixel_models.build(cfg, pixel_models.plan(cfg), args.channels, [])
    one = forward_flops(unet)
    step, timesteps = 3 * one * cfg.train_batch_size, cfg.num_train_timesteps or 1000  # backward: twice the forward
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {one / 1e9:.2f} GFLOP an image")
    for what, flops in (
        (f"training, {cfg.max_steps:,} steps of {cfg.train_batch_size}", step * cfg.max_steps),
        (f"sampling, {SAMPLES:,} images in {timesteps} steps", one * SAMPLES * timesteps),
    ):
        print(f"{what}: {flops:.3g} FLOP, {flops / args.tflops / 1e12 / 3600:.1f} h at {args.tflops:g} TFLOP/s")
