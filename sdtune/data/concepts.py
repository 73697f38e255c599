"""Several subjects of one run, listed in a JSON file as diffusers' script of Custom Diffusion has it.

``[{"instance_prompt": ..., "instance_data_dir": ..., "class_prompt": ..., "class_data_dir": ...}, ...]``
"""

import json
from pathlib import Path
from typing import NamedTuple

from sdtune.config.sections import UserError

KEYS = ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir")


class Concept(NamedTuple):
    """A subject: where its images are, what captions those without a caption of their own, and its class."""

    instance_data_dir: str
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: str | None = None


def read_concepts(file: Path, of_class: bool) -> list[Concept]:
    """The subjects that a file lists.

    Args:
        of_class: whether images of each class are needed as well.

    Raises:
        UserError: it cannot be read, or something in it is missing or unknown.
    """
    where = f"--concepts-list {file}"
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f'{where}: wants a list such as [{{"instance_data_dir": "photos", "instance_prompt": "..."}}]')
    concepts = []
    for k, entry in enumerate(listed, 1):
        if not isinstance(entry, dict) or not all(v is None or isinstance(v, str) for v in entry.values()):
            raise UserError(f"{where}: entry {k}: wants a text for each of {', '.join(KEYS)}")
        if unknown := sorted(entry.keys() - set(KEYS)):
            raise UserError(f"{where}: entry {k}: {unknown[0]} is none of {', '.join(KEYS)}")
        concept = Concept(entry.get("instance_data_dir") or "", *(entry.get(key) or None for key in KEYS[1:]))
        if not concept.instance_data_dir:
            raise UserError(f"{where}: entry {k}: instance_data_dir is missing, the folder of its images")
        if of_class and not (concept.class_prompt or concept.class_data_dir):
            raise UserError(
                f"{where}: entry {k}: --prior-preservation needs class_prompt, from which the base makes class "
                "pictures, or class_data_dir"
            )
        concepts.append(concept)
    return concepts
