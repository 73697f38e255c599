"""FLUX.2 klein (2026): FLUX.2 with Qwen3 in place of Mistral 3, smaller, and told no guidance."""

from typing import Any, ClassVar

from diffusers import Flux2KleinPipeline

from sdtune.models.families.flux_2 import Flux2
from sdtune.models.families.latent import FLOW_ONLY


class Flux2Klein(Flux2):
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"max_sequence_length"}
