"""Measures the figures of `sdtune evaluate` on changed handwritten digits, and how often the intervals cover.

    python bench/evaluate.py

Half of scikit-learn's 1797 digits is the reference; the other half, changed in a known way, is the samples.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from sdtune.evaluation.distances import estimates, frechet
from sdtune.evaluation.features import embed, load_network
from sdtune.evaluation.scores import figures


def changes(x: Tensor, digit: Tensor, noise: Tensor) -> dict[str, Tensor]:
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), value=-1), 3, 1)
    return {
        "nothing": x,
        "nothing, 200 of them": x[:200],
        "noise of 0.1": x + 0.1 * noise,
        "noise of 0.4": x + 0.4 * noise,
        "a third blurred": 2 / 3 * x + 1 / 3 * blurred,
        "shifted by a pixel": x.roll(1, 3),
        "0.9 of the contrast": 0.9 * (x + 1) - 1,
        "no 3": x[digit != 3],
        "only 0 to 4": x[digit < 5],
    }


def coverage(scale: float, shift: float, pairs: int = 200, resamples: int = 100) -> dict[str, str]:
    """The coverage of intervals for 80 and 120 Gaussian points in three dimensions, over many pairs of such sets.

    For each figure: the share of intervals that contain its mean over all pairs, and the mean width of an interval
    divided by the width that contains 95 % of the pairs.
    """
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(pairs):
        x, y = torch.randn(80, 3, generator=draw), scale * torch.randn(120, 3, generator=draw) + shift
        found.append(estimates(figures, (x.double(), y.double()), resamples))
    shown = {}
    for name in found[0]:
        values = torch.tensor([f[name].value for f in found], dtype=torch.float64)
        low, high = (torch.tensor([getattr(f[name], end) for f in found]) for end in ("low", "high"))
        covered = ((low <= values.mean()) & (values.mean() <= high)).double().mean()
        shown[name] = f"{covered:.0%}, {(high - low).mean() / (2 * 1.96 * values.std()):.2f} times as wide"
    return shown


if __name__ == "__main__":
    data, draw = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=draw)
    pixels = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    digit = torch.tensor(data.target)[order]
    network = load_network("random-conv")
    began = time.monotonic()
    reference = embed(pixels[:900], network)
    print(f"features of 900 images in {time.monotonic() - began:.1f} s")
    print(f"{'changed by':<22} {'frechet':>8} {'kernel':>9} {'precision':>10} {'recall':>7}")
    samples, labels = pixels[900:], digit[900:]
    for name, changed in changes(samples, labels, torch.randn(samples.shape, generator=draw)).items():
        f = figures(embed(changed.clamp(-1, 1), network), reference)
        print(f"{name:<22} {f['frechet']:>8.3f} {f['kernel']:>9.4f} {f['precision']:>10.3f} {f['recall']:>7.3f}")
    x = embed(samples, network)
    began = time.monotonic()
    estimates(figures, (x, reference), 200)
    print(f"intervals by 200 resamples of 897 and 900 in {time.monotonic() - began:.0f} s")
    print("coverage of intervals, different sets:", coverage(1.5, 1))
    print("coverage of intervals, equal sets:", coverage(1, 0))
    assert frechet(reference, reference) < 1e-9
