"""Builds the embedded base `tiny-flow`: text encoder and transformer, trained by flow matching on the VAE of `tiny`.

    python -m tools.build_tiny_flow --work runs/tiny-flow                                      # trains, continues
    python -m tools.build_tiny_flow --work runs/tiny-flow --export sdtune/assets/tiny-flow     # writes the pipeline

A Z-Image at 64 x 64, trained on one core on the images of ``sdtune.data.toy_world``. Velocity alone teaches a
small transformer colours at once and shapes very late. So it begins with layers that know where a token is
(``tell_places``). Two linear readings of its layers, which no export carries, train with it, in the manner of REPA (Yu
et al. 2025): one tells where a token is, the other which of its pixels the shape covers. Pictures whose shape stands in
the middle come first. Matrices are trained by Muon, the rest by AdamW. The state is saved often; the same command
continues, and ``--steps`` may change between calls.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2Tokenizer

from sdtune.data import toy_world
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.run.rng import generator, key
from tools.muon import Muon
from tools.tiny_flow_parts import WIDTH, Captions, make_text_encoder, make_tokenizer, make_transformer
from tools.z_image_forward import CAPTION, forward

TINY = Path(__file__).parents[1] / "sdtune" / "assets" / "tiny"
POOL, PART = 24_000, 1_000
FEWEST, MOST = 0.1, 0.3
"""Share of the pictures, those whose shape strays least from the middle, that the first and the last steps see."""
DENSITY = RectifiedFlow("logit_normal", mean=0.2, std=1.2)
WHERE, COVERED = 0, 2
"""Layers whose output tells the place of a token, and which pixels of it the shape covers."""


# ---- data ----------------------------------------------------------------------------------------------


def scene(k: int) -> toy_world.Scene:
    return toy_world.random_scene(np.random.default_rng([1, k]))


def strayed(shown: toy_world.Scene) -> float:
    """How far a shape is from the middle and from its usual size, about 1 for the average picture."""
    off = max(abs(c) for c in shown.centre) / 0.07
    return max(off, abs(shown.radius / toy_world.RADIUS[shown.size] - 1) / 0.05)


def make_part(vae: AutoencoderKL, first: int) -> dict[str, Tensor]:
    """VAE moments, fp16 ``[PART, 8, 16, 16]``, and covers, of 255, ``[PART, 32, 32]``, of pictures ``first`` ..."""
    scenes = [scene(k) for k in range(first, first + PART)]
    pixels = np.stack([np.asarray(toy_world.render(s)) for s in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    plain = {"colour": "white", "ground": "black", "tint": ((10.0,) * 3, (-20.0,) * 3)}
    covers = [np.asarray(toy_world.render(toy_world.Scene(**(vars(s) | plain)), 32, 32))[..., 0] for s in scenes]
    with torch.no_grad():
        moments = torch.cat([vae.encode(batch).latent_dist.parameters.half() for batch in images.split(50)])
    return {"moments": moments.contiguous(), "covers": torch.from_numpy(np.stack(covers))}


def make_pool(work: Path) -> dict[str, Tensor]:
    """``POOL`` pictures, each part computed once."""
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae", dtype=torch.float32).eval()
    parts = []
    for first in range(0, POOL, PART):
        part = work / f"pool-{first:06d}.safetensors"
        if not part.exists():
            save_file(make_part(vae, first), part.with_suffix(".new"))
            part.with_suffix(".new").replace(part)
            print(f"pool {first + PART}/{POOL}", flush=True)
        parts.append(load_file(part))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Batches:
    def __init__(self, work: Path, captions: Captions):
        self.pool, self.captions = make_pool(work), captions
        scenes = [scene(k) for k in range(POOL)]
        self.by_ease = sorted(range(POOL), key=lambda k: strayed(scenes[k]))
        latents = self.pool["moments"][:2000, :4].float()
        self.shift, self.scale = latents.mean().item(), 1 / latents.std().item()

    def __call__(self, start: int, count: int, share: float) -> dict[str, Any]:
        """Samples ``start`` ... of that ``share`` of pictures that stray least; a tenth of captions is empty."""
        picked, tokens = [], []
        for p in range(start, start + count):
            words = np.random.default_rng([2, p])
            picked.append(self.by_ease[int(words.integers(int(share * POOL)))])
            empty = words.random() < 0.1
            tokens.append(self.captions.tokens("" if empty else toy_world.random_caption(scene(picked[-1]), words)))
        source = generator("tiny-flow", start)
        mean, logvar = self.pool["moments"][picked].float().chunk(2, 1)
        posterior, noise = torch.randn(mean.shape, generator=source), torch.randn(mean.shape, generator=source)
        u = (torch.arange(count) + torch.rand(count, generator=source)) / count  # stratified: less variance
        covers = self.pool["covers"][picked].float() / 255
        return {
            "latents": (mean + (logvar / 2).exp() * posterior - self.shift) * self.scale,
            "covers": functional.pixel_unshuffle(covers[:, None], 4).flatten(2).transpose(1, 2),
            "tokens": tokens,
            "noise": noise,
            "u": u,
        }


# ---- training ------------------------------------------------------------------------------------------


class Stage(nn.Module):
    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.text_encoder, self.transformer = make_text_encoder(tokenizer), make_transformer()
        self.where, self.covered = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The parts of the loss: of the velocity, of the places of tokens, of what the shape covers."""
        x0, noise, tokens = batch["latents"], batch["noise"], batch["tokens"]
        t = DENSITY.timesteps(batch["u"], x0)
        ids = torch.zeros(len(tokens), CAPTION, dtype=torch.long)  # causal: what follows a caption changes nothing
        known = torch.arange(CAPTION) < torch.tensor([len(row) for row in tokens])[:, None]
        ids[known] = torch.cat(tokens)
        words = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        pred, seen = forward(self.transformer, DENSITY.noise(x0, noise, t), 1 - t, words, known)
        velocity = functional.mse_loss(-pred, DENSITY.target(x0, noise, t))
        side = x0.shape[-1] // 2
        rows, columns = self.where(seen[WHERE]).view(-1, 2, side).unbind(1)
        place = torch.arange(side**2).repeat(len(x0))
        covered = self.covered(seen[COVERED])
        return {
            "velocity": velocity,
            "where": functional.cross_entropy(rows, place // side) + functional.cross_entropy(columns, place % side),
            "covered": functional.binary_cross_entropy_with_logits(covered, batch["covers"]),
        }


WEIGHTS = {"velocity": 1.0, "where": 0.02, "covered": 0.5}


def make_optimizers(stage: Stage, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    matrices = (".attention.to_", ".feed_forward.")
    blocks = [p for name, p in stage.named_parameters() if any(part in name for part in matrices)]
    chosen = set(map(id, blocks))
    rest = [p for p in stage.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    return [Muon(blocks, lr=muon), adamw]


def train(work: Path, steps: int, batch: int, muon: float, adam: float, save_every: int = 250) -> None:
    """A short rise, a plateau and a linear fall over the last two fifths; averaged weights are kept."""
    torch.manual_seed(key("init", "tiny-flow"))
    tokenizer = make_tokenizer()
    batches, stage = Batches(work, Captions(tokenizer)), Stage(tokenizer)
    optimizers = make_optimizers(stage, muon, adam)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    mean = {k: v.clone() for k, v in stage.state_dict().items()}
    step, saved = 0, work / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        stage.load_state_dict(state["weights"])
        for optimizer, numbers in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(numbers)
        mean, step = state["mean"], state["step"]
    began, spent, losses = time.time(), time.process_time(), []
    while step < steps:
        factor = min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        parts = stage(batches(step * batch, batch, max(FEWEST, MOST * step / steps)))
        sum(WEIGHTS[name] * part for name, part in parts.items()).backward()
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in stage.state_dict().items():
                mean[name].lerp_(value, 1 - decay) if value.is_floating_point() else mean[name].copy_(value)
        losses.append([part.item() for part in parts.values()])
        if step % 50 == 0:
            shown = " ".join(f"{name} {x:.4f}" for name, x in zip(parts, np.mean(losses, 0), strict=True))
            print(
                f"{step}/{steps} {shown} {time.process_time() - spent:.0f} s CPU {time.time() - began:.0f} s",
                flush=True,
            )
            losses.clear()
        if step % save_every == 0 or step == steps:
            if not np.isfinite(sum(part.item() for part in parts.values())):
                raise SystemExit(f"the loss is not finite at step {step}")
            numbers = [optimizer.state_dict() for optimizer in optimizers]
            state = {"weights": stage.state_dict(), "optimizers": numbers, "mean": mean, "step": step}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


# ---- export --------------------------------------------------------------------------------------------


def export(work: Path, out: Path) -> None:
    """Write the averaged weights, rounded to fp16, which every part is read from as fp32 where no dtype is given."""
    tokenizer = make_tokenizer()
    stage = Stage(tokenizer)
    stage.load_state_dict(torch.load(work / "state.pt", weights_only=True)["mean"])
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae", dtype=torch.float32)
    latents = torch.cat([load_file(p)["moments"][:, :4] for p in sorted(work.glob("pool-*"))[: 2000 // PART]]).float()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=stage.text_encoder,
        tokenizer=tokenizer,
        transformer=stage.transformer,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    for config in out.glob("*/config.json"):
        pred = json.loads(config.read_text(encoding="utf-8"))
        pred.pop("_name_or_path", None)  # a folder of this machine
        if "dtype" in pred:
            pred["dtype"] = "float32"  # transformers loads the precision that it names, diffusers fp32
        config.write_text(json.dumps(pred, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is trained, kept between calls")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--muon", type=float, default=3e-3, help="learning rate of matrices")
    parser.add_argument("--adam", type=float, default=2e-3, help="learning rate of the rest")
    parser.add_argument("--export", type=Path, help="write the pipeline to this folder, and train nothing")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.export:
        export(given.work, given.export)
    else:
        train(given.work, given.steps, given.batch, given.muon, given.adam)
