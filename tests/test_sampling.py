"""Drawing pixels: image k is what stock diffusers draws from the k-th seed, whatever the batch."""

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from sdtune.samplers import make_scheduler
from sdtune.sampling import draw, to_images

SEEDS = [7, 8, 9]


def tiny_unet(channels=1, classes=None, **more) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes and classes + 1,
        **more,
    ).eval()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stock", [DDPMPipeline, DDIMPipeline])
def test_each_image_is_the_one_stock_diffusers_draws(stock, channels):
    unet = tiny_unet(channels)
    pipe = stock(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    scheduler = DDPMScheduler() if stock is DDPMPipeline else make_scheduler("ddim", DDPMScheduler(), clip=True)
    options = {"eta": 0.5} if stock is DDIMPipeline else {}
    ours = to_images(draw(unet, scheduler, SEEDS, steps=5, batch_size=1, **options))
    for seed, image in zip(SEEDS, ours, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = pipe(num_inference_steps=5, generator=generator, **options).images[0]
        assert (image.mode, image.tobytes()) == (theirs.mode, theirs.tobytes())
