"""Compares the ways of teaching `tiny` one subject from five images, and what the base loses by each.

python bench/subject.py --work runs/subject [-n 100] [--only adapters full]

Each row is a shipped recipe, trained unless its run is complete; `toy_world.read` reads the images that it draws.
``subject``: share that shows the subject; ``class``: share of "a ... shape" that shows a shape the base knows, not the
subject, in the right colour on the right ground; ``others``: share of right images of shapes that the base knows by
name.
"""

import argparse
import hashlib
from pathlib import Path

from sdtune.cli import main as sdtune
from sdtune.config.verbs import SampleConfig
from sdtune.evaluation.toy_score import score
from sdtune.models.families import resolve_model
from sdtune.models.loading import load_adapters, load_embeddings, load_pipeline
from sdtune.run.contact_sheet import grid

SKS, WORD = ("heart", "sks shape"), ("heart", "<thing>")
NO_PRIOR = ["--prior-loss-weight", "0"]
WORD_ALONE = ["textual-inversion", "--config", "textual-inversion/tiny-word"]
WAYS = {
    "base": (SKS, []),
    "adapters": (SKS, ["dreambooth", "--config", "dreambooth/tiny-subject"]),
    "adapters, no prior": (SKS, ["dreambooth", "--config", "dreambooth/tiny-subject", *NO_PRIOR]),
    "full": (SKS, ["dreambooth", "--config", "dreambooth/tiny-subject-full"]),
    "full, no prior": (SKS, ["dreambooth", "--config", "dreambooth/tiny-subject-full", *NO_PRIOR]),
    "word and adapters": (WORD, ["dreambooth", "--config", "dreambooth/tiny-subject-pivotal"]),
    "word": (WORD, [*WORD_ALONE, "--dataset", "tiny-subject", "--steps", "1000"]),  # as many as the row above
    "word for a known shape": (("arrow", "<thing>"), WORD_ALONE),
}
"""Name of a row to the subject's shape, its word in captions, and the command that trains it."""


def train(words: list[str], out: Path) -> None:
    try:
        sdtune([*words, "--output-dir", str(out)])
    except SystemExit as ended:
        if ended.code:
            raise


def measure(out: Path | None, shape: str, name: str, n: int) -> dict[str, float]:
    """The scores of a run; writes its images of the subject to ``subject.png`` in its folder."""
    full = out is not None and (out / "model_index.json").is_file()
    pipeline = load_pipeline(SampleConfig(model=str(out) if full else "tiny", prompt=["unused"]))
    if out is not None and not full:
        adapted = (out / "pytorch_lora_weights.safetensors").is_file()
        load_adapters(pipeline, [str(out)] if adapted else [])
        load_embeddings(pipeline, [str(out)] if (out / "learned_embeds.safetensors").is_file() else [])
    shown, images, captions = score(pipeline, n, shape, name=name)
    if out is not None:
        grid(images[:20], captions[:20]).save(out / "subject.png")
    of_class, *_ = score(pipeline, n, "heart", name="shape")
    others, *_ = score(pipeline, n)
    return {
        "subject": shown["shape"],
        "with colours": shown["all"],
        "class": of_class["known"],
        "others": others["all"],
    }


def weights_of(model: str) -> str:
    """One hash over every weight of a base."""
    sha = hashlib.sha256()
    for file in sorted(Path(resolve_model(model)).glob("**/*.safetensors")):
        sha.update(file.read_bytes())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    before = weights_of("tiny")
    for way in args.only:
        (shape, name), words = WAYS[way]
        out = args.work / way.replace(", ", "-").replace(" ", "-") if words else None
        if out is not None:
            train(words, out)
        scores = measure(out, shape, name, args.n)
        print(f"{way:<24}" + ", ".join(f"{title} {value:.0%}" for title, value in scores.items()), flush=True)
    print(f"hash of the base's weights before: {before}, after: {weights_of('tiny')}")


if __name__ == "__main__":
    main()
