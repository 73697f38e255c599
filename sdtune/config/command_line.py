"""A command of the line whose options are the fields of a config class."""

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sdtune.config import fields, parsing, shipped
from sdtune.config.errors import UserError
from sdtune.config.help_style import Command
from sdtune.config.section_base import Section
from sdtune.config.sections import Options
from sdtune.config.untrusted import echo

LENIENT = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
"""Unknown flags are collected, not refused one at a time, so that every mistake is reported at once."""

HELP = {"-h", "--help"}


class OptionCommand:
    """A command that makes a config of its options, of a YAML file and of defaults, and gives it to ``work``.

    Args:
        name: the command as it is typed.
        config: the class whose fields are the options.
        launch: the class of the options beside them, which are not part of the config.
        work: called with the config and the launch options.
        summary: what --help says first.
    """

    def __init__(
        self,
        name: str,
        config: type[Section],
        launch: type[Options],
        work: Callable[[Any, Any], None],
        summary: str | None = None,
    ):
        self.name, self.config, self.launch, self.work = name, config, launch, work
        self.summary = summary or inspect.getdoc(config) or ""
        if shared := config.model_fields.keys() & launch.model_fields.keys():
            raise UserError(f"{config.__name__}.{min(shared)}: sdtune has an option of that name; name it otherwise")

    def signature(self, flags: set[str] | None) -> inspect.Signature:
        """The parameters from which Typer makes the options."""
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        always = parameters(Options, flags)
        options = parameters(self.config, flags)
        launching = [p for p in parameters(self.launch, flags) if p.name not in Options.model_fields]
        return inspect.Signature([context, *always, *options, *launching])

    def run(self, ctx: typer.Context, values: dict[str, Any]) -> None:
        """Resolve the config from the text of each option, and give it to ``work``."""
        given = {n: v for n, v in values.items() if ctx.get_parameter_source(n).name == "COMMANDLINE"}  # type: ignore[union-attr]
        beside = {name: given.pop(name) for name in self.launch.model_fields if name in given}
        loose = list(ctx.args)
        declared = self.config.model_fields
        for argument in [n for n in given if fields.positional(declared[n])]:
            words = [given[argument]] if isinstance(given[argument], str) else list(given[argument])
            flags = [k for k, word in enumerate(words) if word.startswith("--")]
            if flags:  # an unknown one has taken the place of an argument
                loose = words[flags[0] :] + loose
                before = {argument: words[: flags[0]]} if flags[0] else {}
                given = {n: v for n, v in given.items() if n != argument} | before
        problems = list(parsing.unknown_words(self.config, loose, self.launch.model_fields))
        launch, more = parsing.validated(self.launch, beside, {})
        cfg, others = parsing.merged(self.config, beside.get("config"), given)
        if problems := [*problems, *more, *others]:
            raise UserError("\n       ".join(problems))
        if name := beside.get("accelerate_config"):
            shipped.accelerate_file(name)  # a mistake is told before anything slow, and of a dry run
        if launch.dry_run:
            echo(parsing.to_yaml(cfg), end="")
        else:
            self.work(cfg, launch)

    def parser(self, flags: set[str] | None = None) -> TyperCommand:
        """The command as Typer makes it of a function, which has one parameter per option.

        Args:
            flags: those on the line that is to be parsed: Typer takes most of its time for options that nobody gave.
                ``None`` has all options, and their help.
        """

        def run(ctx: typer.Context, **values: Any) -> None:
            self.run(ctx, values)

        run.__signature__ = self.signature(flags)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = LENIENT | {"help_option_names": sorted(HELP)}
        app.command(self.name, cls=Command, help=self.help, context_settings=settings)(run)
        made = typer.main.get_command(app)
        assert isinstance(made, TyperCommand)
        return made

    @property
    def help(self) -> str:
        """The summary, and command lines to start from."""
        return f"{self.summary}\n\n{inspect.cleandoc(self.config.examples)}".strip()

    def context(self, words: list[str], parent: Any = None) -> Any:
        """Typer's context of the command with these words, under which it can be invoked."""
        line = parsing.canonical(self.config, words)
        flags = {word.partition("=")[0].replace("_", "-") for word in line}
        return self.parser(flags if HELP.isdisjoint(words) else None).make_context(self.name, line, parent=parent)


def parameters(config: type[Section], flags: set[str] | None) -> Iterator[inspect.Parameter]:
    """One Typer option per field. Values stay text: pydantic converts them, so that all mistakes come at once."""
    for name, field in fields.by_section(config):
        names = fields.flag(name)
        if flags is not None and not fields.positional(field) and flags.isdisjoint({names, f"--no-{names[2:]}"}):
            continue
        annotation: Any
        default: Any
        if field.annotation is bool:
            annotation, default = bool, bool(field.default)
            names = names if issubclass(config, Options) else f"{names}/--no-{names[2:]}"
        else:
            annotation = (list[str] if fields.is_list(field) else str) | None
            default = None
        option: Any
        text = None if flags is not None else fields.help_of(config, name)
        if place := fields.positional(field):
            option = typer.Argument(metavar=place, help=text, show_default=False)
        else:
            option = typer.Option(
                names,
                help=text,
                metavar=fields.metavar(field),
                rich_help_panel=fields.title_of(config, name),
                show_default=False,
            )
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
        )
