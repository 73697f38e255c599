"""Typer's command and group with the help that sdtune shows."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """Typer's command, which does not show <bool> beside --help."""

    def get_params(self, ctx: Any) -> Any:
        return without_type(super().get_params(ctx))


class Group(TyperGroup):
    """Typer's group, likewise."""

    def get_params(self, ctx: Any) -> Any:
        return without_type(super().get_params(ctx))


def without_type(params: list[Any]) -> list[Any]:
    """The options, of which switches show no type: their name says it."""
    for param in params:
        if param.param_type_name == "option" and param.is_flag:
            param.metavar = ""
    return params
