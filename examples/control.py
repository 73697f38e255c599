"""Networks that follow an image, a model that edits one, and subjects with new words, trained on `tiny` and scored.

python examples/control.py [controlnet] [t2i-adapter] [instruct-pix2pix] [custom-diffusion] [--overwrite]

Without a name, all. Prints scores before and after, and ends with 1 if one is below its bar. All are trained by two
processes of one thread, of which one has the method that takes as long as the three others.
"""

from two_at_a_time import main_of, train

RUNS = {
    "instruct-pix2pix": ("instruct-pix2pix/tiny-edits", "runs/tiny-edits"),
    "custom-diffusion": ("custom-diffusion/tiny-words", "runs/tiny-words-custom"),
    "controlnet": ("controlnet/tiny-edges", "runs/tiny-edges"),
    "t2i-adapter": ("t2i-adapter/tiny-edges", "runs/tiny-edges-adapter"),
}
"""Method to its recipe and the folder of its run."""
PARTS = ["instruct-pix2pix", "controlnet t2i-adapter custom-diffusion"]
"""What one process does."""
BARS: dict[str, dict[str, float]] = {
    "controlnet": {"overlap": 0.75, "close": 0.85, "shape": 0.50, "colour": 0.95, "ground": 0.95, "new": 0.60},
    "t2i-adapter": {"overlap": 0.75, "close": 0.85, "shape": 0.45},
    "instruct-pix2pix": {"right": 0.65, "kept": 0.45, "both": 0.33},
    "custom-diffusion": {"arrow": 0.8, "moon": 0.8, "others": 0.7},
}
MEANING = {
    "overlap": "overlap of the shape with the one whose edges were given",
    "close": "images in which it is above 0.7",
    "shape": "shape as in the caption",
    "colour": "colour as in the caption",
    "ground": "background as in the caption",
    "new": "overlap for stars and hearts, which the base has never seen",
    "right": "edits that did what was asked",
    "kept": "edits that left the rest as it was",
    "both": "edits that did both",
    "arrow": "images of the first new word that show its subject",
    "moon": "images of the second one that show its subject",
    "others": "images of shapes that the base knew which are right",
}


def run(method: str, words: list[str]) -> tuple[str, list[str]]:
    """Train a method; its scores as printed, and the names of those below their bars."""
    # It imports torch and diffusers, which the process that starts the parts can do without.
    from control_scores import SCORES

    recipe, out = RUNS[method]
    before = SCORES[method](None)
    train(recipe, out, words)
    after, below = SCORES[method](out), []
    lines = [f"{method:<18} before   after     bar"]
    for name, value in after.items():
        bar = BARS[method].get(name)
        shown = f"{bar:7.0%}" if bar else " " * 7
        lines.append(f"{'':<16} {before[name]:8.0%} {value:7.0%} {shown}   {MEANING[name]}")
        if bar and value < bar:
            below.append(f"{method}: {name}")
    return "\n".join(lines), below


if __name__ == "__main__":
    main_of(__file__, PARTS, run)
