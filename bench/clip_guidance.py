"""Measures how CLIP guidance steers a model of pixels: shares of pictures whose colour and ground are as asked.

    python bench/clip_guidance.py runs/pixels runs/tiny-clip runs/tiny-clip-noised --scales 0 1 3

The model draws the built-in world (`sdtune ddpm --dataset tiny-shapes`); the others are runs of `sdtune clip`. 40
captions that no CLIP was trained on, DDIM in 25 steps, the same noise at each scale; pictures are read by rules.
"""

import argparse

from diffusers import DDPMPipeline
from PIL import Image

from sdtune.data import toy_world
from sdtune.diffusion.guides import ByClip, embedded
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.evaluation.toy_clip import distinct
from sdtune.evaluation.toy_score import share
from sdtune.models.vision import frozen, load_clip

COUNT, STEPS, SIDE = 40, 25, 64


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="run of sdtune ddpm")
    made.add_argument("clips", nargs="+", help="runs of sdtune clip")
    made.add_argument("--scales", type=float, nargs="+", default=[0, 1, 3])
    given = made.parse_args()
    pipe, pairs = DDPMPipeline.from_pretrained(given.model), distinct(COUNT, 0)
    for name in given.clips:
        network, tokenizer = load_clip(name)
        frozen(network)
        texts = embedded(network.model, tokenizer, [caption for caption, _ in pairs])
        for scale in given.scales:
            guides = [ByClip(network, texts, scale)] if scale else []
            ddim = make_scheduler("ddim", pipe.scheduler)
            drawn = draw(pipe.unet, ddim, range(COUNT), steps=STEPS, guides=guides, batch_size=20)
            images = [image.resize((SIDE, SIDE), Image.Resampling.NEAREST) for image in to_images(drawn)]
            found = [(toy_world.read(image), scene) for image, (_, scene) in zip(images, pairs, strict=True)]
            right = {
                what: share(getattr(reading, what) == getattr(scene, what) for reading, scene in found)
                for what in ("colour", "ground")
            }
            print(f"{name}, scale {scale:g}: " + ", ".join(f"{what} {value:.0%}" for what, value in right.items()))


if __name__ == "__main__":
    main()
