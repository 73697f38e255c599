"""Typer's command and group with the help that sdtune shows."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """Typer's command, which shows no <bool> or <str>."""

    def get_params(self, ctx: Any) -> Any:
        return without_type(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, where a switch and its opposite share a name, so that names fit a terminal of 80 columns."""
        switches = [param for param in self.get_params(ctx) if param.secondary_opts]
        names = [(param.opts, param.secondary_opts) for param in switches]
        for param in switches:
            param.opts, param.secondary_opts = [f"--[no-]{param.opts[0].removeprefix('--')}"], []
        try:
            super().format_help(ctx, formatter)
        finally:  # the options are parsed by these names
            for param, (own, opposite) in zip(switches, names, strict=True):
                param.opts, param.secondary_opts = own, opposite


class Group(TyperGroup):
    """Typer's group, likewise."""

    def get_params(self, ctx: Any) -> Any:
        return without_type(super().get_params(ctx))


def without_type(params: list[Any]) -> list[Any]:
    """The options, of which switches and arguments show no type: their name says it."""
    for param in params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: None
        elif param.is_flag:
            param.metavar = ""
    return params
