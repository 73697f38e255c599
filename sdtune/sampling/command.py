"""The command `sdtune sample`."""

from sdtune.config.verbs import SampleConfig
from sdtune.run.device import less_memory_with
from sdtune.sampling.sample import sample
from sdtune.sampling.xy import draw_tables


def main(cfg: SampleConfig) -> str:
    """Draw what ``cfg`` asks for; what to tell of it."""
    with less_memory_with(memory_options(cfg)):
        if cfg.xy:
            return "\n".join(f"wrote {file}" for file in draw_tables(cfg))
        files = sample(cfg)
    sheet = "interpolation.png" if cfg.interpolate else "grid.png"
    return f"{len(files)} images in {cfg.output_dir}, side by side in {cfg.output_dir / sheet}"


def memory_options(cfg: SampleConfig) -> list[str]:
    """Options with which drawing needs less memory."""
    ways = ["--batch-size 1"] if cfg.batch_size > 1 else []
    ways += ["--mixed-precision bf16"] if cfg.mixed_precision == "no" else []
    return [*ways, "a smaller --width and --height"] if cfg.prompt or cfg.prompt_file else ways
