"""The settings of a run as they stand in its folder, readable without the class that declared them.

``config.yaml`` has the values. ``method.json`` beside it has what the config class declares about them: defaults, which
options are local paths, and the facts for a model card. So a run of a recipe of one's own can be reported and published
where the recipe's file is not at hand.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from sdtune.config import parsing, yaml_text
from sdtune.config.commands import METHODS, config_class
from sdtune.config.section_base import Description
from sdtune.config.sections import Hub, Run, UserError

METHOD = "method.json"


class RunSettings(NamedTuple):
    """Values are JSON: a path is a text."""

    method: str
    """The command."""
    values: dict[str, Any]
    """The value of each option."""
    defaults: dict[str, Any]
    """The default of each option that has one."""
    paths: frozenset[str]
    """Options whose values are files or folders of this machine."""
    about: Description

    @classmethod
    def of(cls, cfg: Run) -> "RunSettings":
        values = parsing.plain(cfg)
        paths = frozenset(name for name in values if isinstance(getattr(cfg, name), Path))
        return cls(cfg.method, values, parsing.defaults_of(type(cfg)), paths, cfg.describe())

    @property
    def hub(self) -> Hub:
        """Where and how the run is published."""
        return Hub.model_validate({name: self.values[name] for name in Hub.model_fields if name in self.values})

    @property
    def out(self) -> Path:
        return Path(self.values["output_dir"])

    def changed(self, values: Mapping[str, Any]) -> "RunSettings":
        return self._replace(values=self.values | dict(values))

    def command(self, words: list[str]) -> str:
        """The shortest command line that gives these settings again."""
        return parsing.command_line(words, self.values, self.defaults)

    def to_yaml(self) -> str:
        return yaml_text.to_text({"method": self.method} | self.values)


def write(cfg: Run, folder: Path) -> None:
    """Write ``method.json``."""
    settings = RunSettings.of(cfg)
    facts = {
        "defaults": settings.defaults,
        "paths": sorted(settings.paths),
        "about": settings.about._asdict(),
    }
    new = folder / f".{METHOD}"
    new.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / METHOD)


def read(folder: Path) -> RunSettings:
    """The settings of the run in a folder.

    Raises:
        UserError: there is no run, or its config or ``method.json`` is damaged.
    """
    written = folder / "config.yaml"
    if not written.is_file():
        raise UserError(f"{folder}: no config.yaml in it, so no run")
    values: dict[str, Any] = {key: value for key, value, _ in yaml_text.read_yaml(written)}
    method = str(values.pop("method", config_class({}).method))
    if (folder / METHOD).is_file():
        return _declared(folder / METHOD, method, values)
    if method not in METHODS:  # an older run of a recipe of one's own: nothing is known of its options but their values
        return RunSettings(method, values, {}, frozenset(), Description(base=values.get("model")))
    known: Any = METHODS[method].load()
    try:
        cfg = known.model_validate({name: value for name, value in values.items() if name in known.model_fields})
    except pydantic.ValidationError as error:
        field, problem = next(iter(parsing.validation_messages(error)))
        raise UserError(f"{written}: not the config of a run: {field}: {problem}") from None
    settings = RunSettings.of(cfg)
    return settings._replace(values=settings.values | values)


def _declared(file: Path, method: str, values: dict[str, Any]) -> RunSettings:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        about = Description(**facts["about"] | {"tags": tuple(facts["about"]["tags"])})
        return RunSettings(method, values, dict(facts["defaults"]), frozenset(facts["paths"]), about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}); the run's own command writes it again") from None
