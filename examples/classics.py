"""The classics, trained on the built-in world: scores before and after, and their bars.

python examples/classics.py [ROW ...] [--overwrite]

Rows: clip, prior, image-decoder, autoencoder, super-resolution, learned-variance; without a name, all. Prints scores
before and after, and ends with 1 if one is below its bar. Several train two at a time, each in a process of one
thread; the three of unCLIP, which read each other's runs, one after the other in one.
"""

from two_at_a_time import main_of

PARTS = ["clip prior image-decoder", "autoencoder", "super-resolution", "learned-variance"]


def run(row: str, words: list[str]) -> tuple[str, list[str]]:
    # It imports torch and diffusers, which the process that starts the parts can do without.
    from classic_rows import ROWS

    return ROWS[row](words)


if __name__ == "__main__":
    main_of(__file__, PARTS, run)
