"""Compares the memory estimate of `sdtune check` with what a run uses: the same options, in fresh processes.

    python bench/memory.py --work runs/memory
    python bench/memory.py --work runs/memory --only '^middle, LoRA'

The measurement is the peak resident set of the training process over two steps, from metrics.jsonl, with the model
loaded and the cache filled by an earlier run. malloc returns memory at once (MALLOC_MMAP_THRESHOLD_=131072,
MALLOC_ARENA_MAX=2), so that what is counted is what is in use. The shapes are `tiny`; `tiny` with a UNet of a hundred
million random parameters; and the UNet of `ddpm/cifar10`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from harness import write

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
STEPS = "--steps 2 --log-steps 2 --num-validation-images 0 --dataloader-num-workers 0 --overwrite".split()
LATENT = ["--dataset", "tiny-hearts", "--resolution", "64"]
CASES = {
    "full": ["text-to-image"],
    "full, checkpointing": ["text-to-image", "--gradient-checkpointing"],
    "full, average": ["text-to-image", "--use-ema"],
    "full, 8-bit Adam": ["text-to-image", "--use-8bit-adam"],
    "full, bf16": ["text-to-image", "--mixed-precision", "bf16"],
    "LoRA": ["lora"],
    "LoRA, checkpointing": ["lora", "--gradient-checkpointing"],
    "LoRA, bf16": ["lora", "--mixed-precision", "bf16"],
    "LoRA, int8 base": ["lora", "--quantize-base", "int8"],
    "LoRA, nf4 base": ["lora", "--quantize-base", "nf4"],
}
PIXELS = {
    "full": ["ddpm", "--no-use-ema"],
    "full, checkpointing": ["ddpm", "--no-use-ema", "--gradient-checkpointing"],
    "full, average": ["ddpm"],
    "full, 8-bit Adam": ["ddpm", "--no-use-ema", "--use-8bit-adam"],
    "full, bf16": ["ddpm", "--no-use-ema", "--mixed-precision", "bf16"],
}


def cases(work: Path) -> dict[tuple[str, str], list[str]]:
    """(shape, options) to a command line."""
    given = {("tiny", name): [*words, *LATENT, "--train-batch-size", "8"] for name, words in CASES.items()}
    middle = ["--model", str(work / "middle"), "--train-batch-size", "2"]
    given |= {("middle", name): [*words, *LATENT, *middle] for name, words in CASES.items()}
    cifar = ["--config", "ddpm/cifar10", "--dataset", "tiny-hearts", "--image-column", "image"]
    cifar += ["--train-batch-size", "16", "--num-holdout-images", "0"]
    return given | {("cifar10", name): [*words, *cifar] for name, words in PIXELS.items()}


def build_middle(folder: Path) -> None:
    """`tiny` with a UNet of about a hundred million random parameters."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from sdtune.models import families

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(families.resolve_model("tiny"), safety_checker=None)
    wide = dict(pipe.unet.config) | {"block_out_channels": (192, 384, 512), "layers_per_block": 2}
    kinds = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    wide |= {"down_block_types": kinds, "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2)}
    pipe.unet = UNet2DConditionModel.from_config(wide | {"norm_num_groups": 32, "attention_head_dim": 8})
    pipe.save_pretrained(folder)


def estimated(words: list[str]) -> dict[str, int]:
    """The memory that `sdtune check` estimates for a command in a fresh process, in bytes by kind."""
    printed = python([__file__, "--estimate", *words, *STEPS])
    return json.loads(printed.splitlines()[-1])


def estimate(words: list[str]) -> None:
    """Print an estimate as JSON, by the code of `sdtune check`."""
    from sdtune import cli
    from sdtune.training import check

    def tell(need, _):
        yield json.dumps(need._asdict())

    check.memory_lines = tell
    cli.main(["check", *[w for w in words if w != "--overwrite"]])


def measured(words: list[str], out: Path) -> int:
    """Bytes at the peak of a run that trains two steps."""
    python(["-m", "sdtune", *words, *STEPS, "--output-dir", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(line["peak_memory"] for line in lines if "peak_memory" in line)


def python(words: list[str]) -> str:
    run = subprocess.run([sys.executable, *words], env=os.environ | MALLOC, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(words)}:\n{run.stderr[-2000:]}")
    return run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="where to write all that was measured; leave out for the table alone")
    parser.add_argument("--only", default="", help="the cases to measure: a regular expression on `shape, options`")
    given = parser.parse_args()
    if not (given.work / "middle" / "model_index.json").exists():
        python([__file__, "--build", str(given.work / "middle")])  # a child's peak begins at its parent's
    filled: set[str] = set()  # whose cache of moments and embeddings is
    print("| Shape, options | estimate | measured | error |\n| --- | --- | --- | --- |")
    for (shape, name), words in cases(given.work).items():
        if not re.search(given.only, f"{shape}, {name}"):
            continue
        need = sum(estimated([*words, "--output-dir", str(given.work / "none")]).values())
        if words[0] != "ddpm" and shape not in filled:
            measured(words, given.work / "run")
            filled.add(shape)
        took = measured(words, given.work / "run")
        write({"what": f"{shape}, {name}", "estimate": need, "measured": took}, given.json)
        print(f"| {shape}, {name} | {need / 1e6:.0f} MB | {took / 1e6:.0f} MB | {need / took - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--estimate"]:
        estimate(sys.argv[2:])
    elif sys.argv[1:2] == ["--build"]:
        build_middle(Path(sys.argv[2]))
    else:
        main()
