"""The command `sdtune sample`."""

from sdtune.config.verbs import SampleConfig
from sdtune.sampling.sample import sample
from sdtune.sampling.xy import draw_tables


def main(cfg: SampleConfig) -> str:
    """Draw what ``cfg`` asks for; what to tell of it."""
    if cfg.xy:
        return "\n".join(f"wrote {file}" for file in draw_tables(cfg))
    files = sample(cfg)
    sheet = "interpolation.png" if cfg.interpolate else "grid.png"
    return f"{len(files)} images in {cfg.output_dir}, side by side in {cfg.output_dir / sheet}"
