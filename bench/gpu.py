"""What only a GPU can tell, in ten minutes: `make gpu` runs each row and says which passed, failed or was skipped.

    python bench/gpu.py
    python bench/gpu.py --only 'resume|half' --peer ~/diffusers

On a machine without a GPU the rows run on the CPU with the same small models, and those that need one are skipped by
name. The last rows measure full-size shapes and take most of the time; ``--peer`` is a checkout of diffusers whose
script they are compared with.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # this process leaves the GPU alone, so that it can be forked

import torch
from harness import parser, table, write

from sdtune.cli import main as main_of_sdtune
from sdtune.training import loop  # noqa: F401  so that no fork has to import it

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()
SMALL = "--steps 2 --num-validation-images 0 --log-steps 1 --overwrite --train-batch-size 2 --dataloader-num-workers 0"
LORA = f"lora --model tiny --dataset tiny-hearts --resolution 64 {SMALL}"
PIXELS = f"ddpm --dataset digits --resolution 8 --block-out-channels 32 64 --layers-per-block 1 {SMALL}"


class Skipped(Exception):
    """Why a row was not run."""


def needs_gpu() -> None:
    if not GPU:
        raise Skipped("needs a GPU")


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise Skipped(f"needs {library}")


def sdtune(words: str, out: Path, **environment: str) -> Path:
    """Train, in a fork, since imports take longer than such a run; a failure raises AssertionError."""
    printed = out.with_suffix(".printed")

    def work() -> None:
        os.environ.update(environment)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        main_of_sdtune([*words.split(), "--output-dir", str(out)])

    child = get_context("fork").Process(target=work)
    child.start()
    child.join()
    text = printed.read_text(encoding="utf-8", errors="replace")
    assert child.exitcode == 0, f"{words}: exit code {child.exitcode}: {text[-600:]}"
    return out


def script(code: str) -> str:
    """Run Python in a process of its own; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.strip()


def digest(run: Path, name: str) -> str:
    return hashlib.sha256((run / name).read_bytes()).hexdigest()[:16]


ADAPTER, UNET = "pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"

# ---- the rows -------------------------------------------------------------------------------------------


def no_waiting(work: Path) -> str:
    """Three steps in which nothing makes the host wait for the GPU."""
    needs_gpu()
    return script("from on_gpu import no_waiting; no_waiting()")


def gradients_of_fast_ways(work: Path) -> str:
    """Loss and gradients of a step in half precision, compiled and recorded, against eager float64."""
    needs_gpu()
    return script("from on_gpu import gradients; gradients()")


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


def compiled_pixels(work: Path) -> str:
    needs_gpu()
    sdtune(f"{PIXELS} --compile", work / "run")
    return "trained"


def eight_bit_products(work: Path) -> str:
    """All weights, and a batch that no block divides."""
    needs_gpu()
    needs("torchao")
    if script("import torch; print(torch.cuda.get_device_capability() < (8, 9))") == "True":
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
    needs_gpu()
    return script(f"from on_gpu import memory; memory({str(work)!r})")


def full_size(shape: str, peer: Path | None) -> Callable[[Path], str]:
    def measure(work: Path) -> str:
        needs_gpu()
        line = [sys.executable, str(HERE / "cuda_step.py"), "--work", str(work.parent / "full-size"), "--shape", shape]
        line += ["--bf16", "--rounds", "1", *(["--peer", str(peer)] if peer else [])]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-800:]
        print(done.stdout, flush=True)
        return "see above"

    return measure


def rows(peer: Path | None) -> dict[str, Callable[[Path], str]]:
    return {
        "no step waits for the GPU": no_waiting,
        "gradients: half precision, compiled, recorded": gradients_of_fast_ways,
        "recomputed activations with a new word": recomputed_with_a_word,
        "half precision, 20 steps": half_precision,
        "resume to the bit": resume_with_any_kernels,
        "resume to the bit, --deterministic": resume_with_deterministic_kernels,
        "a model of pixels, compiled": compiled_pixels,
        "8-bit products, all weights": eight_bit_products,
        "8-bit Adam of bitsandbytes": eight_bit_adam,
        "8-bit Adam of torchao": eight_bit_adam_of_torchao,
        "base in 8 bits": base_in_8_bits,
        "base in 4 bits": base_in_4_bits,
        "two processes, replicated and in slices": two_processes,
        "peak memory against the estimate": memory_of_a_step,
        **{f"images a second, {shape}": full_size(shape, peer) for shape in ("sd15", "sdxl", "sd3")},
    }


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--only", default="", help="a regular expression on the names of rows")
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    given = made.parse_args()
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["SDTUNE_CACHE"] = f"{place}/cache"
        for name, row in rows(given.peer).items():
            if not re.search(given.only, name):
                continue
            begun, work = time.monotonic(), Path(place) / str(len(found))
            work.mkdir()
            try:
                told = ["passed", row(work)]
            except Skipped as why:
                told = ["skipped", str(why)]
            except AssertionError as error:
                told = ["FAILED", " ".join(str(error).split())]
            found.append([name, *told, f"{time.monotonic() - begun:.0f} s"])
            print("  ".join(found[-1]), flush=True)
    print(table(["row", "result", "said", "took"], found))
    write({"what": "rows of make gpu", "rows": found}, given.json)
    sys.exit(any(result == "FAILED" for _, result, *_ in found))


if __name__ == "__main__":
    main()
