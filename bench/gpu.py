"""What only a GPU can tell, in ten minutes: `make gpu` runs each row and says which passed, failed or was skipped.

    python bench/gpu.py
    python bench/gpu.py --only 'resume|half' --peer ~/diffusers

On a machine without a GPU the rows run on the CPU with the same small models, and those that need one are skipped by
name. The last rows measure full-size shapes and take most of the time; ``--peer`` is a checkout of diffusers whose
script they are compared with. A row that would not end within ``--minutes`` is not begun, and the table names it.
"""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpu_runs import GPU, HERE, Skipped, digest, give, left, needs, needs_gpu, python, sdtune, started
from harness import on_what, parser, table, write

SMALL = "--steps 2 --num-validation-images 0 --log-steps 1 --overwrite --train-batch-size 2 --dataloader-num-workers 0"
LORA = f"lora --model tiny --dataset tiny-hearts --resolution 64 {SMALL}"
PIXELS = f"ddpm --dataset digits --resolution 8 --block-out-channels 32 64 --layers-per-block 1 {SMALL}"


class Row(NamedTuple):
    work: Callable[[Path], str]
    """Given a folder, does it and says what was found; AssertionError where it failed."""
    takes: int = 30
    """Seconds on a GPU, at the most."""


ADAPTER, UNET = "pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"

# ---- the rows -------------------------------------------------------------------------------------------


def no_waiting(work: Path) -> str:
    """Three steps in which nothing makes the host wait for the GPU."""
    return python("-c", "from on_gpu import no_waiting; no_waiting()")


def gradients(*options: str) -> Callable[[Path], str]:
    """Loss and each gradient of a step in each precision, against eager float64; "" is without options."""

    def compare(work: Path) -> str:
        if options == ("compile",):
            needs_gpu()  # on a CPU --compile is refused
        return python("-c", f"from on_gpu import gradients; gradients(*{options!r})")

    return compare


def recomputed_with_a_word(work: Path) -> str:
    words = "textual-inversion --model tiny --dataset tiny-word --placeholder-token <w> --resolution 64"
    sdtune(f"{words} --gradient-checkpointing {SMALL}", work / "run")
    return "trained"


def half_precision(work: Path) -> str:
    """Twenty steps in each half precision: finite, and in fp16 with few steps skipped."""
    import json

    said = []
    for precision in ("bf16", "fp16"):
        out = sdtune(LORA.replace("--steps 2", f"--steps 20 --mixed-precision {precision}"), work / precision)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if "loss" in line][-1]
        assert last["loss"] is not None and last["skipped_steps"] < 5, last
        said.append(f"{precision} loss {last['loss']:.4f}, {last['skipped_steps']} skipped")
    return "; ".join(said)


def resume(work: Path, more: str = "") -> str:
    """Six steps at once and three and three leave the same bits."""
    for words, name in ((LORA, ADAPTER), (PIXELS, UNET)):
        kind = words.split()[0]
        whole = sdtune(f"{words.replace('--steps 2', '--steps 6')} {more}", work / f"{kind}-whole")
        halves = words.replace("--overwrite", "")
        sdtune(f"{halves.replace('--steps 2', '--steps 3')} {more}", work / f"{kind}-parts")
        parts = sdtune(f"{halves.replace('--steps 2', '--steps 6')} {more}", work / f"{kind}-parts")
        assert digest(whole, name) == digest(parts, name), f"{kind}: other bits"
    return "equal bits"


def resume_with_any_kernels(work: Path) -> str:
    try:
        return resume(work)
    except AssertionError as error:
        if GPU and "other bits" in str(error):
            return "other bits, which is why --deterministic is there"
        raise


def resume_with_deterministic_kernels(work: Path) -> str:
    return resume(work, "--deterministic")


def kill_and_resume(work: Path) -> str:
    """A run that SIGKILL ends, at a checkpoint or in the middle of one, is continued to the bits of a whole one."""
    words = LORA.replace("--steps 2", "--steps 30 --checkpointing-steps 1 --deterministic").replace("--overwrite", "")
    whole, parts = sdtune(words, work / "whole"), work / "parts"
    child = started(words, parts)
    while child.is_alive() and len(list(parts.glob("checkpoints/step-*"))) < 2:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"it had ended before, with exit code {child.exitcode}"
    assert not (parts / ADAPTER).exists(), "it had ended before"
    sdtune(words, parts)
    assert digest(whole, ADAPTER) == digest(parts, ADAPTER), "other bits"
    return "equal bits"


def compiled_pixels(work: Path) -> str:
    needs_gpu()
    sdtune(f"{PIXELS} --compile", work / "run")
    return "trained"


def eight_bit_products(work: Path) -> str:
    """All weights, and a batch that no block divides."""
    needs_gpu()
    needs("torchao")
    if python("-c", "import torch; print(torch.cuda.get_device_capability() < (8, 9))") == "True":
        raise Skipped("needs compute capability 8.9")
    sdtune(
        f"text-to-image --model tiny --dataset tiny-hearts --resolution 64 --mixed-precision fp8 {SMALL}", work / "r"
    )
    return "trained"


def eight_bit_adam(work: Path) -> str:
    needs("bitsandbytes")
    sdtune(f"{LORA} --use-8bit-adam", work / "run")
    return "trained"


def eight_bit_adam_of_torchao(work: Path) -> str:
    needs("torchao")
    sdtune(f"{LORA} --optimizer torchao_adamw8bit", work / "run")
    return "trained"


def base_in_8_bits(work: Path) -> str:
    needs("torchao")
    sdtune(f"{LORA} --quantize-base int8", work / "run")
    return "trained"


def base_in_4_bits(work: Path) -> str:
    needs("bitsandbytes")
    sdtune(f"{LORA} --quantize-base nf4", work / "run")
    return "trained"


def two_processes(work: Path) -> str:
    """On the CPU, as NCCL takes no GPU twice: replicated, and continued in slices, and continued by one process."""
    words, on_cpu = LORA.replace("--overwrite", ""), {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    sdtune(f"{words} --num-processes 2 --accelerate-config cpu", work / "run", **on_cpu)
    more = words.replace("--steps 2", "--steps 3")
    sdtune(f"{more} --num-processes 2 --accelerate-config fsdp2", work / "run", **on_cpu)
    alone = words.replace("--steps 2", "--steps 4").replace("--train-batch-size 2", "--train-batch-size 4")
    sdtune(alone, work / "run", **on_cpu)
    return "saved and continued"


def memory_of_a_step(work: Path) -> str:
    """The peak of a run against the estimate of `sdtune check`."""
    return python("-c", f"from on_gpu import memory; memory({str(work)!r})")


def images_a_second(shape: str, peer: Path | None) -> Callable[[Path], str]:
    def measure(work: Path) -> str:
        line = [str(HERE / "cuda_step.py"), "--work", str(work.parent / "bases"), "--shape", shape, "--rounds", "1"]
        line += ["--peer", str(peer.resolve())] if peer else []
        if shape == "tiny":
            line += ["--steps", "12", "--only", "^sdtune$|graphs|compile"]
        else:
            needs_gpu()
            line += ["--bf16"]
        print(python(*line), flush=True)
        return "see above"

    return measure


def rows(peer: Path | None) -> dict[str, Row]:
    return {
        "no step waits for the GPU": Row(no_waiting),
        "gradients: eager, recomputed, recorded": Row(gradients("", "gradient_checkpointing", "cuda_graphs")),
        "gradients: compiled": Row(gradients("compile"), 60),
        "recomputed activations with a new word": Row(recomputed_with_a_word),
        "half precision, 20 steps": Row(half_precision),
        "resume to the bit": Row(resume_with_any_kernels),
        "resume to the bit, --deterministic": Row(resume_with_deterministic_kernels),
        "killed, and resumed to the bit": Row(kill_and_resume),
        "a model of pixels, compiled": Row(compiled_pixels, 60),
        "8-bit products, all weights": Row(eight_bit_products),
        "8-bit Adam of bitsandbytes": Row(eight_bit_adam),
        "8-bit Adam of torchao": Row(eight_bit_adam_of_torchao),
        "base in 8 bits": Row(base_in_8_bits),
        "base in 4 bits": Row(base_in_4_bits),
        "two processes, replicated and in slices": Row(two_processes),
        "peak memory against the estimate": Row(memory_of_a_step, 60),
        "images a second, tiny": Row(images_a_second("tiny", peer), 60),
        "images a second, sd15": Row(images_a_second("sd15", peer), 120),
        "images a second, sdxl": Row(images_a_second("sdxl", peer), 200),
        "images a second, sd3": Row(images_a_second("sd3", peer), 200),
    }


def result_of(row: Row, work: Path) -> list[str]:
    """What became of a row, and what it said."""
    try:
        if left() < row.takes:
            raise Skipped(f"takes up to {row.takes} s, and {left():.0f} s were left")
        return ["passed", row.work(work)]
    except Skipped as why:
        return ["skipped", str(why)]
    except AssertionError as error:
        return ["FAILED", " ".join(str(error).split())]


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--only", default="", help="a regular expression on the names of rows")
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("--minutes", type=float, default=10, help="for all rows together")
    given = made.parse_args()
    give(60 * given.minutes)
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["SDTUNE_CACHE"] = f"{place}/cache"
        for name, row in rows(given.peer).items():
            if not re.search(given.only, name):
                continue
            begun, work = time.monotonic(), Path(place) / str(len(found))
            work.mkdir()
            found.append([name, *result_of(row, work), f"{time.monotonic() - begun:.0f} s"])
            print(*found[-1], f"{left():.0f} s left", sep="  ", flush=True)
    print(table(["row", "result", "said", "took"], found))
    print(on_what())
    write({"what": "rows of make gpu", "rows": found}, given.json)
    sys.exit(any(result == "FAILED" for _, result, *_ in found))


if __name__ == "__main__":
    main()
