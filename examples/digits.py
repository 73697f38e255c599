"""Handwritten digits from noise: trains pixel models on two cores, draws from them, and has a classifier judge them.

python examples/digits.py [--overwrite]            a model without classes
python examples/digits.py guided [--overwrite]     then one with classes, and a classifier that guides the first

The judge is a support vector machine fitted to the digits that the models were trained on. Its accuracy is measured on
held-out digits; it has never seen noise.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMPipeline
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch import Tensor
from torch.multiprocessing import get_context

from sdtune.cli import main
from sdtune.config import parsing
from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data import Stream, load_images
from sdtune.diffusion.guides import ByClassifier
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.evaluation.distances import frechet
from sdtune.evaluation.features import embed, load_network
from sdtune.models.families import silence_libraries
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.run.contact_sheet import grid

UNCONDITIONAL, CLASSES, CLASSIFIER = "runs/ddpm-digits", "runs/ddpm-digits-classes", "runs/classifier-digits"
IMAGES, PROCESSES, CONFIDENT = 500, 2, 0.8


@dataclass
class Call:
    """Images that one process draws; ``labels`` are for the model's classes, or for the classifier if it has none."""

    model: str
    seeds: Sequence[int]
    sampler: str
    steps: int
    labels: Sequence[int] | None = None
    scale: float = 1.0

    def __call__(self) -> Tensor:
        torch.set_num_threads(1)
        silence_libraries()
        pipeline = DDPMPipeline.from_pretrained(self.model)
        scheduler = make_scheduler(self.sampler, pipeline.scheduler)
        labels = None if self.labels is None else torch.tensor(self.labels)
        own, guides = {}, []
        if labels is not None and pipeline.unet.config.num_class_embeds:
            own = {"labels": labels, "guidance_scale": self.scale}
        elif labels is not None:
            guides = [ByClassifier(NoisyClassifier.from_pretrained(CLASSIFIER), labels, self.scale)]
        return draw(pipeline.unet, scheduler, self.seeds, steps=self.steps, guides=guides, batch_size=250, **own)


def drawn(model: str, sampler: str, steps: int, labels: Sequence[int] | None = None, scale: float = 1.0) -> Tensor:
    """``IMAGES`` of a model ``[N, 1, 8, 8]``, one for each seed, by ``PROCESSES`` processes."""
    shares = [slice(rank, None, PROCESSES) for rank in range(PROCESSES)]
    calls = [Call(model, range(IMAGES)[s], sampler, steps, labels and labels[s], scale) for s in shares]
    images = torch.empty(IMAGES, 1, 8, 8)
    with get_context("spawn").Pool(PROCESSES) as pool:
        for share, part in zip(shares, pool.map(Call.__call__, calls), strict=True):
            images[share] = part
    return images


class Judge:
    """Reads digits; ``real`` are those that it was fitted to."""

    def __init__(self) -> None:
        cfg = parsing.resolve(DdpmConfig, "ddpm/digits", {}, [])
        photos = load_images(cfg, captions=False, class_column="folder")
        stream = Stream(cfg, photos, 1, "L")
        self.real, digits = self.read(stream, [stream._unaugmented(index) for index in stream.indices])
        self.machine = CalibratedClassifierCV(SVC(C=10), ensemble=False).fit(self.real.flatten(1).numpy(), digits)
        held, truth = self.read(stream, stream.holdout)
        self.accuracy = float((self.probabilities(held).argmax(1) == truth).mean())

    @staticmethod
    def read(stream: Stream, samples: Sequence) -> tuple[Tensor, np.ndarray]:
        digits = [int(stream.images.rows[sample.index].label) for sample in samples]
        return torch.stack([stream.pixels(sample) for sample in samples]), np.array(digits)

    def probabilities(self, images: Tensor) -> np.ndarray:
        return self.machine.predict_proba(images.flatten(1).numpy())


def train(*words: str) -> None:
    """Train a shipped recipe on ``PROCESSES`` cores that share its step."""
    cut = ["--num-processes", str(PROCESSES), "--train-batch-size", str(64 // PROCESSES), "--dataloader-num-workers=0"]
    try:
        main([*words, *cut])
    except SystemExit as ended:
        if ended.code:
            raise


def table(rows: list[tuple[str, float, str, bool]]) -> str:
    """What was measured and what is wanted, a line each."""
    return "\n".join(
        f"{what:<74} {value:8.3f}   {wanted:<8} {'' if met else 'MISSED'}".rstrip() for what, value, wanted, met in rows
    )


def print_table(rows: list[tuple[str, float, str, bool]]) -> bool:
    """Print it; whether all of it is met."""
    print(table(rows))
    return all(met for *_, met in rows)


def unconditional(judge: Judge) -> bool:
    network = load_network("random-conv")
    real = embed(judge.real, network)
    rows = [("accuracy of the judge on digits held out", judge.accuracy, ">= 0.95", judge.accuracy >= 0.95)]
    distances = {}
    for name, sampler, steps in (("DDPM, 1000 steps", "ddpm", 1000), ("DDIM, 25 steps", "ddim", 25)):
        images = drawn(UNCONDITIONAL, sampler, steps)
        odds = judge.probabilities(images)
        sure, digits = float((odds.max(1) >= CONFIDENT).mean()), len(set(odds.argmax(1)))
        distances[name] = frechet(embed(images, network), real)
        rows += [
            (f"{name}: share of {IMAGES} of which the judge is sure", sure, ">= 0.8", sure >= 0.8),
            (f"{name}: digits among them", digits, "10", digits == 10),
        ]
        labels = [str(digit) for digit in odds[:40].argmax(1)]
        grid(to_images(images[:40]), labels, 10).save(f"{UNCONDITIONAL}/{sampler}-{steps}.png")
    many, few = distances.values()
    rows += [(f"Frechet distance, random-conv: {name}", distance, "", True) for name, distance in distances.items()]
    rows.append(("25 steps over 1000", few / many, "<= 1.15", few <= 1.15 * many))
    return print_table(rows)


def guided(judge: Judge) -> bool:
    asked = [k % 10 for k in range(IMAGES)]

    def right(images: Tensor) -> float:
        return float((judge.probabilities(images).argmax(1) == asked).mean())

    rows = []
    free = {scale: right(drawn(CLASSES, "ddim", 25, asked, scale)) for scale in (1.0, 2.0, 4.0)}
    for scale, share in free.items():
        rows.append((f"classes, classifier-free guidance {scale:g}: right digit", share, "", True))
    rows.append(("classes: right digit at the best scale", max(free.values()), ">= 0.95", max(free.values()) >= 0.95))
    steered = {scale: drawn(UNCONDITIONAL, "ddim", 25, asked, scale) for scale in (0.0, 1.0, 2.0, 4.0)}
    shares = {scale: right(images) for scale, images in steered.items()}
    for scale, share in shares.items():
        rows.append((f"no classes, classifier guidance {scale:g}: right digit", share, "" if scale else "chance", True))
    best = max(shares, key=shares.__getitem__)
    rows.append(("no classes: right digit at the best scale", shares[best], ">= 0.8", shares[best] >= 0.8))
    grid(to_images(steered[best][:40]), [str(digit) for digit in asked[:40]], 10).save(f"{CLASSIFIER}/guided.png")
    return print_table(rows)


if __name__ == "__main__":
    began, words = time.monotonic(), sys.argv[1:]
    with_classes = words[:1] == ["guided"]
    train("ddpm", "--config", "ddpm/digits", *([] if with_classes else words))
    if with_classes:
        train("ddpm", "--config", "ddpm/digits-classes", *words[1:])
        train("classifier", "--config", "classifier/digits", *words[1:])
    met = (guided if with_classes else unconditional)(Judge())
    print(f"{time.monotonic() - began:.0f} seconds")
    sys.exit(not met)
