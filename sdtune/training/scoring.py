"""Scores of a run while it trains (``--evaluate-steps``), and the step that is best by one of them."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL.Image import Image
from torch import Tensor

from sdtune.config.scores import OF_AGREEMENT, SCORES, score_name, score_of
from sdtune.config.sections import Prompts, UserError
from sdtune.data.images import to_tensor
from sdtune.evaluation import scores
from sdtune.evaluation.agreement import edge_overlap
from sdtune.evaluation.features import embed_each, load_network
from sdtune.evaluation.judges import Classifier, Clip
from sdtune.recipes.recipe import Recipe, RecipeDataset, TrainingConfig
from sdtune.run.metrics_file import read_lines
from sdtune.training.preview import Attempt, draw

MOST = 500
"""Images of the dataset that samples are compared with, at most, of those trained on and of those held out."""
RESAMPLES = 100
"""Of the bootstrap for each interval."""
NEIGHBOURS = 3
"""Of precision and recall."""
ALWAYS = ("likeness", "holdout_loss", *OF_AGREEMENT.values())
"""Scores for which the config says whether they can be measured, or nothing is needed."""


class Scorer:
    """Draws images with fixed prompts and seeds, and scores them; each process draws and reads its share.

    Samples are compared with images as the model sees them: those trained on, for likeness, diversity and
    memorisation, and those held out, if there are enough, for the distances. Their features are computed once.

    Raises:
        UserError: what was asked for cannot be measured; raised before the first step.
    """

    def __init__(self, cfg: TrainingConfig, dataset: RecipeDataset, accelerator: Accelerator):
        self.cfg, self.accelerator = cfg, accelerator
        self.prompts = dataset.scored_prompts(cfg.num_evaluation_images)
        if cfg.keep_best == "holdout_loss" and not cfg.num_holdout_images:
            raise UserError("--keep-best holdout_loss: nothing is held out; add --num-holdout-images 8, or so")
        self.network = load_network(cfg.features)
        self.clip = Clip(cfg.clip_model) if cfg.clip_model else None
        self.judge = Classifier(cfg.classifier) if cfg.classifier else None
        if self.judge:
            for prompt in self.prompts:
                self.judge.class_of(str(prompt))
        self.networks = [self.network, *(judge.network for judge in (self.clip, self.judge) if judge)]
        stream = dataset.stream
        self.trained_on = self._features(stream, distinct(stream))
        held = self._features(stream, stream.holdout[:MOST])
        least = scores.least_images(NEIGHBOURS, RESAMPLES)
        self.unseen = held if len(held) >= least else None
        if min(cfg.num_evaluation_images, len(self.trained_on)) < 2:
            raise UserError("--evaluate-steps: two images of the dataset and --num-evaluation-images 2 are the least")
        if self.unseen is not None and cfg.num_evaluation_images < least:
            raise UserError(f"--num-evaluation-images {cfg.num_evaluation_images}: give at least {least}")
        possible = {"clip_score": self.clip, "class_accuracy": self.judge} | dict.fromkeys(ALWAYS, True)
        if cfg.keep_best and not possible.get(cfg.keep_best, self.unseen is not None):
            needed = {"clip_score": "--clip-model", "class_accuracy": "--classifier"}
            missing = needed.get(cfg.keep_best, f"--num-holdout-images {least} or more")
            raise UserError(f"--keep-best {cfg.keep_best}: add {missing}, which it is measured with")
        self.edits = self._edits() if cfg.agreement == "edit" else []

    def measure(self, recipe: Recipe, attempt: Attempt) -> dict[str, float] | None:
        """The scores by name, with the ends of their intervals, on every process; None if a signal came first."""
        count = self.cfg.num_evaluation_images
        drawn = draw(recipe, self.prompts, count, self.accelerator, attempt)
        pixels = [pixels_of(image) for _, image in drawn]
        seen = [embed_each(pixels, network) for network in self.networks]
        if self.cfg.agreement == "edges":
            followed = (self._prompt(k).images[0] for k, _ in drawn)
            seen.append([edge_overlap(image, other) for (_, image), other in zip(drawn, followed, strict=True)])
        mine = [(k, [features[i] for features in seen]) for i, (k, _) in enumerate(drawn)]
        gathered = sorted(gather_object(mine), key=lambda pair: pair[0])[:count]
        found: list[dict[str, float] | None] = [None]
        if self.accelerator.is_main_process and len(gathered) == count:
            found = [self._figures([torch.stack(rows) for rows in zip(*(row for _, row in gathered), strict=True)])]
        broadcast_object_list(found)
        return found[0]

    def plan(self, total: int, samples: int) -> str:
        """What the scores cost, in one line.

        Args:
            total: optimizer steps of the run.
            samples: images that it trains on.
        """
        cfg = self.cfg
        times = 1 + math.ceil(total / cfg.evaluate_steps)
        each = cfg.passes_per_step if isinstance(cfg, Prompts) else 1
        passes = times * cfg.num_evaluation_images * cfg.validation_inference_steps * each
        held = "" if self.unseen is not None else "; without enough held-out images no distances"
        shown = min(len(self.prompts), cfg.num_evaluation_images)
        agreement = f"; agreement with {shown} images: {cfg.agreement}" if cfg.agreement else ""
        return (
            f"scores: {times} times {cfg.num_evaluation_images} images, {passes:,} passes of the denoiser, beside "
            f"{samples:,} in training, each with a backward pass{held}{agreement}"
        )

    def _figures(self, features: list[Tensor]) -> dict[str, float]:
        x, *judged = features
        bootstrap = scores.Bootstrap(RESAMPLES)
        found = bootstrap(scores.of_subject, x, self.trained_on)
        found |= scores.of_copies(x, self.trained_on, self.unseen, bootstrap)
        if self.unseen is not None:
            found |= bootstrap(partial(scores.figures, neighbours=NEIGHBOURS), x, self.unseen)
        prompts = [str(self._prompt(k)) for k in range(len(x))]
        if self.clip:
            by_clip = judged.pop(0)
            found |= scores.mean_of("clip_score", self.clip.scores(by_clip, prompts), bootstrap)
            if self.edits:
                before, *texts = zip(*(self.edits[k % len(self.edits)] for k in range(len(x))), strict=True)
                directions = self.clip.directions(torch.stack(before), by_clip, *texts)
                found |= scores.mean_of("edit_direction", directions, bootstrap)
        if self.judge:
            found |= scores.mean_of("class_accuracy", self.judge.right(judged.pop(0), prompts), bootstrap)
        if self.cfg.agreement == "edges":
            found |= scores.mean_of("edge_overlap", judged.pop(0), bootstrap)
        return scores.flat(found, lambda score: score_name(score, str(self.network.label)))

    def _prompt(self, k: int) -> Any:
        """What image ``k`` shows."""
        return self.prompts[k % len(self.prompts)]

    def _edits(self) -> list[tuple[Tensor, str, str]]:
        """For each prompt CLIP's features of the image before the edit, and the captions before and after it."""
        assert self.clip
        if any(prompt.edit is None for prompt in self.prompts):
            raise UserError(
                "--original-caption-column: the images that are scored are not those of the dataset with their own "
                "instructions; add --num-holdout-images 8, or so, which are scored then"
            )
        seen = embed_each([pixels_of(prompt.images[0]) for prompt in self.prompts], self.clip.network)
        return [(x, *prompt.edit) for x, prompt in zip(seen, self.prompts, strict=True)]

    def _features(self, stream: Any, samples: Sequence[Any]) -> Tensor:
        """Features of images of the dataset [N, D] on every process, each of which has computed its share."""
        share = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        rows = embed_each([stream.pixels(samples[k]) for k in share], self.network)
        found = sorted(gather_object(list(zip(share, rows, strict=True))), key=lambda pair: pair[0])
        return torch.stack([row for _, row in found]) if found else torch.empty(0)


def distinct(stream: Any) -> list[Any]:
    """The first `MOST` different images that the run shows, without those of a class."""
    found: dict[int, Any] = {}
    for position in range(min(stream.epoch_length, 20 * MOST)):
        sample = stream[position]
        if sample.part < stream.images.subjects and len(found) < MOST:
            found.setdefault(sample.index, sample)
    return list(found.values())


def pixels_of(image: Image) -> Tensor:
    """An image as float32 [C, H, W] in [-1, 1]."""
    return to_tensor(image, *image.size, 0.5, 0.5, False, "nearest")


class Best:
    """The step with the best score so far, and how many scores ago that was.

    It is computed from ``metrics.jsonl``, so a run that continues has the same best, and no state of its own.

    Args:
        step: lines up to this step count; later ones were written by an interrupted run after its last checkpoint.
    """

    def __init__(self, cfg: TrainingConfig, step: int):
        self.score, self.patience = cfg.keep_best, cfg.patience
        self.value, self.step, self.since = math.nan, 0, 0
        self.measured = False
        """Whether the scores of this step are there; a stop cuts them short, and the step is saved."""
        metrics = cfg.output_dir / "metrics.jsonl"
        for line in read_lines(metrics) if cfg.evaluate_steps and step else []:
            if line["step"] <= step:
                self.update(line["step"], line)
                self.measured |= line["step"] == step and any(score_of(name) == "likeness" for name in line)

    def update(self, step: int, figures: Mapping[str, Any]) -> bool:
        """Count the scores of a step; whether it is the one to keep.

        Of equal scores the later one is kept, which was trained for longer; for `--patience` it is no better.
        """
        values = [value for name, value in figures.items() if score_of(name) == self.score and value is not None]
        if not self.score or not values:
            return False
        higher = SCORES[self.score].better == "higher"
        better = math.isnan(self.value) or (values[0] > self.value if higher else values[0] < self.value)
        self.since = 0 if better else self.since + 1
        if better or values[0] == self.value:
            self.value, self.step = values[0], step
            return True
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run ends early (--patience)."""
        return 0 < self.patience <= self.since
