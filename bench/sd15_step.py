"""Runs `sdtune lora` on a pipeline of Stable Diffusion 1.5's full size with random weights: real steps, no download.

    python bench/sd15_step.py --work runs/sd15-random --resolution 256 --steps 2

Builds the folder once (4.2 GB in fp32), draws eight captioned images, and runs the command line. Peak memory and
images per second are in the run's metrics.jsonl.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.cli import main
from sdtune.data import toy_world
from sdtune.models import families


def build(folder: Path) -> None:
    """The configuration of stable-diffusion-v1-5, with tiny's tokenizer in place of CLIP's of 49,408 words."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(families.resolve_model("tiny"), subfolder="tokenizer")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def draw(folder: Path, side: int) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for k in range(8):
            scene = toy_world.random_scene(np.random.default_rng(k))
            toy_world.render(scene, side, side).save(folder / f"{k}.png")
            lines.write(json.dumps({"file_name": f"{k}.png", "text": toy_world.caption(scene)}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    given, more = parser.parse_known_args()
    model, images = given.work / "model", given.work / f"images-{given.resolution}"
    if not (model / "model_index.json").exists():
        build(model)
    if not images.exists():
        draw(images, given.resolution)
    words = ["lora", "--model", str(model), "--dataset", str(images), "--output-dir", str(given.work / "run")]
    words += ["--resolution", str(given.resolution), "--steps", str(given.steps), "--train-batch-size", "1"]
    words += ["--num-validation-images", "0", "--log-steps", "1", "--dataloader-num-workers", "0", "--overwrite"]
    main([*words, *more])
