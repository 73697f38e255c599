"""Measures the small parts of a step and of a start alone, each beside the usual way to do it.

python bench/micro.py
python bench/micro.py --only 'optimizer|average' --parameters 114e6
"""

import io
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from harness import in_turn, parser, report
from PIL import Image
from torch import nn

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data.cache import Store, write_tensors
from sdtune.data.images import decode
from sdtune.models import families
from sdtune.models.fused_lora import LowRank
from sdtune.models.joined_lora import LowRankTogether
from sdtune.models.lean_layers import by_product
from sdtune.training import optim

Arms = dict[str, Callable[[], Any]]


def weights_of(count: float) -> list[nn.Parameter]:
    """About so many numbers, in matrices of a million."""
    return [nn.Parameter(torch.randn(1000, 1000)) for _ in range(max(1, round(count / 1e6)))]


def groups(count: float) -> Iterator[tuple[str, Arms]]:
    """What is measured: a title, and ways to do the same."""
    cfg = DdpmConfig(dataset="digits", output_dir=Path("none"))
    weights = weights_of(count)
    for w in weights:
        w.grad = torch.randn_like(w) * 1e-3
    fused = optim.make_optimizer(cfg, [{"params": weights, "lr": 1e-9}])
    plain = torch.optim.AdamW(weights, lr=1e-9)
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])

    def clipped_apart() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        plain.step()

    yield (
        f"optimizer, {count:.3g} parameters, clipping",
        {"torch's default": clipped_apart, "sdtune": lambda: optim.clipped_step(fused, norm, 1.0)},
    )
    peer = EMAModel(weights)
    average = optim.Average(cfg, {str(k): w for k, w in enumerate(weights)})
    yield (
        f"average of {count:.3g} parameters",
        {"diffusers' EMAModel": lambda: peer.step(weights), "sdtune": lambda: average.update(100)},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).resize((1024, 1024)).save(data, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as place:
        keys = [f"{k:064x}" for k in range(64)]
        write_tensors(Path(place) / "part.safetensors", {key: torch.randn(8, 64, 64) for key in keys})
        store = Store(Path(place))
        turns = iter(range(10**9))
        yield (
            "an image for a step",
            {
                "decoded, 1024 px": lambda: np.asarray(decode(data.getvalue())),
                "its moments from the cache": lambda: store[keys[next(turns) % len(keys)]] + 0,
            },
        )
    for tokens, width in ((4096, 320), (1024, 640), (256, 1280)):
        yield f"q, k, v of {tokens:,} tokens, {width} wide", projections(tokens, width)
    for dtype in (torch.float32, torch.bfloat16):
        for side in (4, 8, 16, 32):
            title = f"convolution of 1,280 channels, {side} x {side} places, {str(dtype).removeprefix('torch.')}"
            yield title, convolutions(side, dtype)
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(families.resolve_model("tiny"), subfolder="tokenizer")
    captions = [f"a big red circle on a pink background, number {k}" for k in range(100)]
    yield (
        "100 captions",
        {"tokenized one by one": lambda: [tokenizer(c) for c in captions], "together": lambda: tokenizer(captions)},
    )


def projections(tokens: int, width: int, rank: int = 4) -> Arms:
    """Queries, keys and values of one input with their adapters, there and back: three products, or one of all."""
    x, grad = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, 3 * width)
    weights = [torch.randn(width, width) for _ in range(3)]
    sides = ((rank, width), (width, rank))
    factors = [torch.randn(side, requires_grad=True) for _ in weights for side in sides]
    joined = torch.cat(weights)

    def one_by_one() -> None:
        pairs = zip(weights, factors[::2], factors[1::2], strict=True)
        torch.autograd.backward([LowRank.apply(x, x, w, None, a, b, 1.0) for w, a, b in pairs], grad.split(width, -1))

    def in_one() -> None:
        LowRankTogether.apply(x, joined, None, (1.0, 1.0, 1.0), *factors).backward(grad)

    return {"one by one": one_by_one, "in one product": in_one}


def convolutions(side: int, dtype: torch.dtype, channels: int = 1280) -> Arms:
    """Eight frozen convolutions there and back to their input, by oneDNN, or as products.

    Eight, because the weight of one would still be in the cache of the processor when it is called again.
    """
    layers = [nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(dtype) for _ in range(8)]
    x = torch.randn(1, channels, side, side, dtype=dtype, requires_grad=True)
    return {
        "oneDNN": lambda: [layer(x).sum().backward() for layer in layers],
        "products": lambda: [by_product(layer, x).sum().backward() for layer in layers],
    }


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """CPU seconds of one call, of as many as take a twentieth of a second."""

    def measure() -> float:
        work()
        start, calls = time.process_time(), 0
        while (spent := time.process_time() - start) < 0.05:
            work()
            calls += 1
        return spent / calls

    return measure


def main() -> None:
    made = parser(__doc__, rounds=7)
    made.add_argument("--only", default="", help="a regular expression on the titles")
    made.add_argument("--parameters", type=float, default=2e7)
    given = made.parse_args()
    for title, arms in groups(given.parameters):
        if re.search(given.only, title):
            found = in_turn({name: timed(work) for name, work in arms.items()}, given.rounds)
            report(title, found, "CPU ms", given.json, 1000)


if __name__ == "__main__":
    main()
