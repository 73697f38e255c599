"""Computes what a run of 512 GPUs over 100 million images needs of disks, network and time, from stated numbers.

    python examples/scale.py

Prints the tables of docs/scale.md. Nothing was measured at that size. Each input has its source in the table, or
"assumed": replace it with your own.
"""

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

Row = tuple[str, str, str]


class Given(NamedTuple):
    """The inputs, in SI units."""

    gpus: int = 512
    images: float = 100e6
    epochs: int = 10
    batch: int = 32
    """Images on a GPU at a time."""
    forward: float = 0.804e12
    """Floating-point operations of the UNet of Stable Diffusion 1.5 forward at 512 pixels, batch 1."""
    backward: float = 2 * 0.804e12
    encode: float = 1.117e12
    embed: float = 0.013e12
    peak: float = 790e12
    utilisation: float = 0.35
    parameters: float = 860e6
    image_bytes: float = 113e3
    decoded: float = 240.0
    """Images a CPU second that are read, decoded and cropped."""
    looked_up: float = 60e-6
    """Seconds that a core takes to look up an image in a tar."""
    shard: int = 10_000
    index: int = 32
    """Bytes kept of an image, on disk."""
    known: int = 600
    """Bytes held of a shard, in memory of each process."""
    moments: int = 8 * 64 * 64 * 2
    text: int = 77 * 768 * 2
    link: float = 50e9
    """Bytes a second between GPUs of different machines, for each GPU."""
    latency: float = 0.05
    """Seconds that a read of a part of a file takes from an object store."""
    stream: float = 100e6
    """Bytes a second that a process reads from front to back."""
    disk: float = 20e9
    """Bytes a second that the shared disk takes from all machines."""
    writer: float = 1e9
    """Bytes a second that one process writes, hashes and flushes."""
    restart: float = 300.0
    """Seconds from a failure to the next step."""
    failures: int = 419
    failure_days: int = 54
    failure_gpus: int = 16_384


def sources(g: Given) -> Iterator[Row]:
    yield (
        "GPUs; images; epochs; images a GPU at a time",
        f"{g.gpus}; {g.images:,.0f}; {g.epochs}; {g.batch}",
        "the question",
    )
    unet = f"{g.forward / 1e12:.3f}; {g.backward / 1e12:.3f} TF"
    yield "UNet of SD 1.5 at 512 px: forward; backward", unet, "counted; all weights train, so twice forward"
    yield "VAE encoder; text encoder", f"{g.encode / 1e12:.3f}; {g.embed / 1e12:.3f} TF", "counted"
    yield "H200 in bf16; share of it that is used", f"{g.peak / 1e12:.0f} TF/s; {g.utilisation:.0%}", "assumed"
    yield "trained parameters, in fp32", f"{g.parameters / 1e6:.0f} M", "the UNet"
    yield "an image, a JPEG of 512 px", f"{g.image_bytes / 1e3:.0f} kB", "`bench/streaming.py`"
    yield "a core reads, decodes, crops", f"{g.decoded:.0f} images/s", "`bench/streaming.py`, CPU seconds"
    yield "a core looks up a tar", f"{1 / g.looked_up:,.0f} images/s", "`bench/streaming.py`, CPU seconds"
    yield "between machines, for each GPU", f"{g.link / 1e9:.0f} GB/s", "a card of 400 Gb/s each; assumed"
    yield "a read from an object store", f"{g.latency * 1e3:.0f} ms", "assumed"
    yield "the same, from front to back", f"{g.stream / 1e6:.0f} MB/s for each process", "assumed"
    yield "shared disk: all writers; one process", f"{g.disk / 1e9:.0f}; {g.writer / 1e9:.0f} GB/s", "assumed"
    yield "from a failure to the next step", f"{g.restart:.0f} s", "assumed"
    often = f"{g.failures} in {g.failure_days} days on {g.failure_gpus:,} GPUs"
    yield "unexpected interruptions", often, "Llama 3 (Grattafiori et al. 2024, section 3.3.4)"


def steps_and_data(g: Given) -> Iterator[Row]:
    rate = g.peak * g.utilisation
    fresh, kept = g.forward + g.backward + g.encode + g.embed, g.forward + g.backward + g.embed
    speed = rate / fresh
    yield "images/s of a GPU; of all", "rate / (UNet + VAE + text)", f"{speed:.0f}; {speed * g.gpus:,.0f}"
    step = g.batch / speed
    yield "a step: time; images", "batch / (images/s)", f"{step * 1e3:.0f} ms; {g.batch * g.gpus:,}"
    exchange = 2 * 4 * g.parameters / g.link
    yield "gradients exchanged in a step", "2 x 4 B x parameters / link", f"{exchange * 1e3:.0f} ms"
    behind = g.backward / fresh * step
    yield "backward pass to hide it behind", "its share of the step", f"{behind * 1e3:.0f} ms"
    yield "an epoch; the run", "images / (images/s)", f"{hours(g, fresh) / g.epochs:.2f}; {hours(g, fresh):.1f} h"
    yield (
        "bytes read by a GPU; by all",
        "images/s x size",
        f"{speed * g.image_bytes / 1e6:.1f} MB/s; " + (f"{speed * g.gpus * g.image_bytes / 1e9:.1f} GB/s"),
    )
    yield "cores that decode, for each GPU", "images/s / 240", f"{speed / g.decoded:.1f}"
    yield (
        "workers for each GPU, from an object store",
        "images/s x (latency + decoding)",
        (f"{speed * (g.latency + 1 / g.decoded):.1f}"),
    )
    shards = g.images / g.shard
    yield (
        "shards of 10,000 images; for each lane",
        "images / 10,000; / 512 lanes",
        f"{shards:,.0f}; {shards / g.gpus:.0f}",
    )
    held = f"{g.images * g.index / 1e9:.1f} GB; {shards * g.known / 1e6:.0f} MB"
    yield "index: on disk; in memory of a process", "32 B an image; 600 B a shard", held
    looking = g.images * g.looked_up / g.gpus
    yield "looking up all shards, once", "images x 60 us / processes", f"{looking:.0f} s, beside the disk"
    far = g.images * g.image_bytes / (g.gpus * g.stream)
    yield "the same far away, all of it read once", "images x size / (processes x 100 MB/s)", f"{far / 60:.1f} min"
    yield "the run with `--shard-cache`", "no VAE", f"{hours(g, kept):.1f} h, after its build"


def hours(g: Given, work: float) -> float:
    return g.epochs * g.images * work / (g.gpus * g.peak * g.utilisation) / 3600


def cache(g: Given) -> Iterator[Row]:
    yield "VAE moments, bf16", "images x 8 x 64 x 64 x 2 B", f"{g.images * g.moments / 1e12:.2f} TB"
    encoding = g.images * g.encode / (g.gpus * g.peak * g.utilisation)
    writing = g.images * g.moments / g.disk
    yield "build: encoding", "images x VAE / rate", f"{encoding / 60:.0f} min"
    yield "build: writing", "size / disk, beside encoding", f"{writing / 60:.0f} min"
    yield "saved in each later epoch", "the same encoding", f"{encoding / 60:.0f} min"
    yield (
        "lost when a build is killed",
        "a shard of each process",
        f"{g.shard * g.encode / g.peak / g.utilisation:.0f} s",
    )
    share = g.embed / (g.forward + g.backward + g.embed)
    yield (
        "text embeddings, were they kept",
        "images x 77 x 768 x 2 B",
        f"{g.images * g.text / 1e12:.1f} TB, for {share:.1%}",
    )


def failing(g: Given) -> Iterator[Row]:
    each = g.failure_days * 24 * g.failure_gpus / g.failures
    yield "hours between failures, one GPU", "54 x 24 x 16,384 / 419", f"{each:,.0f} h"
    between = each / g.gpus * 3600
    yield "between failures, the run (M)", "/ 512", f"{between / 3600:.0f} h"
    run = hours(g, g.forward + g.backward + g.encode + g.embed) * 3600
    yield "failures expected in the run", "run / M", f"{run / between:.2f}"
    size = 4 * 4 * g.parameters
    cost = size / g.writer
    yield "a checkpoint: weights, two moments, average", "4 x 4 B x parameters", f"{size / 1e9:.1f} GB"
    yield "time it takes, all GPUs waiting (d)", "size / one writer", f"{cost:.0f} s"
    young = sqrt(2 * cost * between)
    small = sqrt(cost / (2 * between))
    daly = young * (1 + small / 3 + small**2 / 9) - cost
    yield "best interval, Young", "sqrt(2 d M)", f"{young / 60:.0f} min"
    yield "best interval, Daly (T)", "equation 37", f"{daly / 60:.0f} min"
    step = g.batch * (g.forward + g.backward + g.encode + g.embed) / (g.peak * g.utilisation)
    yield "the same as `--checkpointing-steps`", "T / step", f"{daly / step:,.0f}"
    lost = cost / daly + (daly / 2 + g.restart) / between
    yield "lost to checkpoints and failures", "d / T + (T / 2 + restart) / M", f"{lost:.2%}, {lost * run / 60:.0f} min"
    often = 500 * step
    yield (
        "with the default of 500 steps",
        "the same, T = 500 steps",
        (f"{cost / often + (often / 2 + g.restart) / between:.1%}"),
    )


def shown(title: tuple[str, str, str], rows: Iterator[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (title, ("---",) * 3, *rows))


if __name__ == "__main__":
    given = Given()
    columns = ("What", "How", "Value")
    print(f"What goes in:\n\n{shown(('What', 'Value', 'Source'), sources(given))}\n")
    print(f"Steps and data:\n\n{shown(columns, steps_and_data(given))}\n")
    print(f"The cache:\n\n{shown(columns, cache(given))}\n")
    print(f"Failures:\n\n{shown(columns, failing(given))}")
