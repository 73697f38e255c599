"""``sampling.json`` beside an artefact: in how many steps, and how, a distilled model or one that enlarges is sampled.

``sdtune sample`` takes these where its options say nothing, and the card and the report show them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sdtune.config.errors import UserError
from sdtune.config.untrusted import printable

SAMPLING = "sampling.json"


class Sampling(NamedTuple):
    """How a model wants to be sampled."""

    steps: int
    guidance_scale: float | None = None
    """Of a text-to-image pipeline's call; 1 is none."""
    call: dict[str, float] | None = None
    """What the stock call takes for that guidance, where it counts it otherwise or under another name; and its noise
    level, if it enlarges.
    """
    lcm: dict[str, float] | None = None
    """For an adapter that wants diffusers' LCMScheduler: what its configuration says otherwise than the base's."""
    factor: int | None = None
    """How many times larger a model that enlarges makes a side."""
    max_noise_level: int | None = None
    """The highest level of noise that such a model was trained to be told."""

    def to_bytes(self) -> bytes:
        fields = {name: value for name, value in self._asdict().items() if value is not None}
        return (json.dumps(fields, indent=1) + "\n").encode()

    def write(self, folder: Path) -> Path:
        """Write the file, whole or not at all."""
        new, path = folder / f".{SAMPLING}", folder / SAMPLING
        new.write_bytes(self.to_bytes())
        new.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> "Sampling | None":
        """What a file says, which may be anybody's; ``None`` where there is none.

        Raises:
            UserError: it says something else.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
        if not _valid(fields):
            raise UserError(
                f"{path}: says nothing that this version knows: {printable(json.dumps(fields)[:100], lines=False)}"
            )
        return cls(**fields)


LCM = {"original_inference_steps": int, "timestep_scaling": float}
"""Settings of an LCMScheduler that an adapter may ask for."""

CALL = ("guidance_scale", "true_cfg_scale", "noise_level")
"""What stock pipelines call their guidance, and the level to which they noise what they enlarge."""
WHOLE = {"steps": 1, "factor": 2, "max_noise_level": 0}
"""Fields that are whole numbers, each with its least value."""


def _valid(fields: Any) -> bool:
    def number(value: Any, least: float) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 1e5

    if not isinstance(fields, dict) or not fields.keys() <= set(Sampling._fields):
        return False
    lcm, call = fields.get("lcm", {}), fields.get("call", {})
    return (
        "steps" in fields
        and all(isinstance(fields[k], int) and number(fields[k], least) for k, least in WHOLE.items() if k in fields)
        and number(fields.get("guidance_scale", 1), 0)
        and isinstance(call, dict)
        and all(name in CALL and number(value, 0) for name, value in call.items())
        and isinstance(lcm, dict)
        and all(name in LCM and isinstance(value, LCM[name] | int) and number(value, 0) for name, value in lcm.items())
    )
