"""Tiny pipelines of the base models, which the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import pipelines


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a base's tiny pipeline, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            build = getattr(pipelines, name.replace("-", "_"))
            made[name] = pipelines.save(build, tmp_path_factory.mktemp("bases") / name)
        return made[name]

    return folder
