"""Builds the embedded base `tiny` from scratch: tokenizer, VAE, then text encoder and UNet together.

    torchrun --standalone --nproc-per-node 2 tools/build_tiny.py --work runs/tiny          # both stages
    python tools/build_tiny.py --work runs/tiny --export sdtune/assets/tiny                # write the pipeline

A Stable Diffusion of 4.2 million parameters at 64 x 64, trained on the images of
``sdtune.data.toy_world``. It predicts velocity (Salimans & Ho 2022) on a schedule that ends in pure noise (Lin et
al. 2023): with the usual schedule a trace of each image's mean is left at the last step, and flat colours, which are
all in the mean, come out wrong. Each stage saves its state; the same command continues.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.data import toy_world
from sdtune.diffusion.objective import DDPM, denoising_loss
from sdtune.run.rng import generator, key

BOS, EOS, WINDOW = "<|startoftext|>", "<|endoftext|>", 77
POOL = 40_000
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


# ---- parts ---------------------------------------------------------------------------------------------


def bpe_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE for any text, with each word of the toy world as one token: (vocabulary, merges)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    tokens, merges = letters + [c + "</w>" for c in letters], []
    for word in toy_world.WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[-1])
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}, merges


def make_tokenizer() -> CLIPTokenizer:
    vocabulary, merges = bpe_tables()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def make_vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels to 16 x 16 x 4 latents."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(48, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


# ---- the two stages ------------------------------------------------------------------------------------


def pixels(start: int, count: int) -> tuple[Tensor, list[toy_world.Scene]]:
    """Pictures ``start`` ... of the training world, in [-1, 1] ``[count, 3, 64, 64]``, and their scenes."""
    scenes = [toy_world.random_scene(np.random.default_rng([1, k])) for k in range(start, start + count)]
    array = np.stack([np.asarray(toy_world.render(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1, scenes


class Vae(nn.Module):
    """Rombach et al. 2022, appendix G, with a slight KL term and no discriminator: L1 is enough for flat shapes."""

    learning_rate = 2e-3

    def __init__(self):
        super().__init__()
        self.vae = make_vae()

    def forward(self, batch: Tensor, step: int) -> Tensor:
        posterior = self.vae.encode(batch).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=generator("vae", step, dist.get_rank() if dist.is_initialized() else 0)
        )
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return (decoded - batch).abs().mean() + 1e-7 * posterior.kl().mean()

    def batch(self, start: int, count: int) -> Tensor:
        return pixels(start, count)[0]


class Denoiser(nn.Module):
    """Text encoder and UNet under the denoising loss (Rombach et al. 2022, equation 3), a tenth of captions empty."""

    learning_rate = 1e-3

    def __init__(self, work: Path):
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.text_encoder, self.unet = make_text_encoder(self.tokenizer), make_unet()
        self.pool, self.scale = latent_pool(work), 1.0
        self.scale = 1 / self.pool[:2000, :4].float().std().item()
        self.objective = DDPM(DDIMScheduler(**SCHEDULE).alphas_cumprod, "v_prediction")

    def forward(self, batch: dict, step: int) -> Tensor:
        cond = self.text_encoder(batch["tokens"])[0]
        predict = lambda x_t, t: self.unet(x_t, t, encoder_hidden_states=cond).sample  # noqa: E731
        return denoising_loss(self.objective, predict, batch["latents"], batch).mean()

    def batch(self, start: int, count: int) -> dict:
        captions, latents, draws = [], [], []
        for p in range(start, start + count):
            words = np.random.default_rng([2, p])
            k = int(words.integers(POOL))
            scene = toy_world.random_scene(np.random.default_rng([1, k]))
            captions.append("" if words.random() < 0.1 else toy_world.random_caption(scene, words))
            mean, logvar = self.pool[k].float().chunk(2)
            source = generator("tiny", p)
            latents.append((mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=source)) * self.scale)
            draws.append((torch.randn(mean.shape, generator=source), torch.rand((), generator=source)))
        tokens = self.tokenizer(captions, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
        noise, u = zip(*draws, strict=True)
        return {
            "latents": torch.stack(latents),
            "tokens": tokens.input_ids,
            "noise": torch.stack(noise),
            "u": torch.stack(u),
        }


def latent_pool(work: Path) -> Tensor:
    """VAE moments of ``POOL`` pictures, fp16 ``[POOL, 8, 16, 16]``, each process computing its share once."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shares = [work / f"pool-{i}.safetensors" for i in range(2)]
    vae = make_vae().eval()
    vae.load_state_dict({k.removeprefix("vae."): v for k, v in load_file(work / "Vae.safetensors").items()})
    for i, share in enumerate(shares):
        if i % world == rank and not share.exists():
            half = POOL // 2
            with torch.no_grad():
                parts = [
                    vae.encode(pixels(k, 100)[0]).latent_dist.parameters.half()
                    for k in range(i * half, (i + 1) * half, 100)
                ]
            save_file({"moments": torch.cat(parts).contiguous()}, share)
    if world > 1:
        dist.barrier()
    return torch.cat([load_file(share)["moments"] for share in shares])


def train(stage: nn.Module, work: Path, steps: int, batch: int, save_every: int = 250) -> None:
    """AdamW, a short rise, a long plateau and a linear fall over the second half; averaged weights are kept."""
    accelerator = Accelerator(cpu=True)
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    torch.manual_seed(key("init", type(stage).__name__))
    for module in stage.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=stage.learning_rate, weight_decay=1e-2, fused=True)
    mean = {k: v.clone() for k, v in stage.state_dict().items()}
    step, saved = 0, work / f"{type(stage).__name__}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        stage.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        mean, step = state["mean"], state["step"]
    model = accelerator.prepare(stage)
    began, losses = time.time(), []
    while step < steps:
        rise, fall = min(1, (step + 1) / 100), min(1, (steps - step) / (0.5 * steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * rise * fall
        loss = model(stage.batch((step * world + rank) * batch, batch), step)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in stage.state_dict().items():
                mean[name].lerp_(value, 1 - decay) if value.is_floating_point() else mean[name].copy_(value)
        losses.append(loss.item())
        if main and step % 50 == 0:
            print(
                f"{type(stage).__name__} {step}/{steps} loss {np.mean(losses):.4f} {time.time() - began:.0f} s",
                flush=True,
            )
            losses.clear()
        if main and (step % save_every == 0 or step == steps):
            if not math.isfinite(loss.item()):
                raise SystemExit(f"loss is {loss.item()} at step {step}")
            state = {"weights": stage.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "step": step}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            save_file({k: v.contiguous() for k, v in mean.items()}, work / f"{type(stage).__name__}.safetensors")
    accelerator.wait_for_everyone()


# ---- export --------------------------------------------------------------------------------------------


def export(work: Path, out: Path) -> None:
    """Write the pipeline in fp16 and in the layout of published Stable Diffusion 1.5 folders."""
    trained = load_file(work / "Denoiser.safetensors")
    pool = torch.cat([load_file(work / f"pool-{i}.safetensors")["moments"] for i in range(2)])
    tokenizer, vae, unet = make_tokenizer(), make_vae(), make_unet()
    text_encoder = make_text_encoder(tokenizer)
    vae.load_state_dict({k.removeprefix("vae."): v for k, v in load_file(work / "Vae.safetensors").items()})
    vae.register_to_config(scaling_factor=1 / pool[:2000, :4].float().std().item())
    for name, part in {"unet": unet, "text_encoder": text_encoder}.items():
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in trained.items() if k.startswith(f"{name}.")})
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    weights = out / "text_encoder" / "model.safetensors"  # transformers 5.6 dropped a level that others expect
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = out / "text_encoder" / "config.json"  # transformers loads the precision that it names, diffusers fp32
    config.write_text(config.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
    vocabulary, merges = bpe_tables()  # transformers 5 writes tokenizer.json alone, others read these
    (out / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (out / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is trained, kept between calls")
    parser.add_argument("--vae-steps", type=int, default=4400)
    parser.add_argument("--steps", type=int, default=5300)
    parser.add_argument("--batch", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--export", type=Path, help="write the pipeline to this folder, and train nothing")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.export:
        export(given.work, given.export)
    else:
        train(Vae(), given.work, given.vae_steps, given.batch // 2)
        train(Denoiser(given.work), given.work, given.steps, given.batch)
