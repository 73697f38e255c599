"""The command line: one command per config, one flag per field, and the verbs around them.

Nothing slow is imported here: a typing mistake, ``--help`` and ``--dry-run`` answer before torch is loaded.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sdtune import __version__
from sdtune.config import parsing
from sdtune.config.methods import METHODS
from sdtune.config.sections import Run, RunFailed, Section, UserError
from sdtune.config.verbs import VERBS, Verb

app = typer.Typer(
    name="sdtune",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune diffusion models: sdtune lora --dataset FOLDER --rank 4, then sdtune sample.",
)


def tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdtune {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=tell_version, help="Print the version.")
    ] = False,
) -> None: ...


# Unknown flags are collected, not refused one at a time, so that every mistake is reported at once.
LENIENT = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


Flags = dict[str, tuple[Any, Any]]
"""Options that are no fields of a config: annotation and default by name."""


def command(config: type[Section], work: Callable[[Any, dict[str, Any]], None], beside: Flags) -> Callable[..., None]:
    """The function behind a command: resolve ``config`` from file and flags, then call ``work(cfg, launching)``.

    Args:
        beside: options that ``work`` gets as ``launching``, where they were given.
    """

    def run(ctx: typer.Context, **values: Any) -> None:
        flags: dict[str, Any] = {
            name: value
            for name, value in values.items()
            if ctx.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
        }
        file, dry_run = flags.pop("config", None), flags.pop("dry_run", False)
        launching: dict[str, Any] = {
            name: flags.pop(name) for name in beside if name in flags and name not in config.model_fields
        }
        loose = list(ctx.args)
        if strays := [n for n in flags if parsing.positional(config.model_fields[n]) and flags[n].startswith("--")]:
            loose = [flags.pop(n) for n in strays] + loose  # an unknown flag has taken the place of an argument
        cfg = parsing.resolve(config, file, flags, loose)
        if name := launching.get("accelerate_config"):
            importlib.import_module("sdtune.training.launch").config_file(
                name
            )  # a mistake is told before anything slow, and of a dry run
        if dry_run:
            typer.echo(parsing.to_yaml(cfg), nl=False)
        else:
            work(cfg, launching)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(
            inspect.Parameter(name, keyword, default=default, annotation=annotation)
            for name, (annotation, default) in (COMMON | beside).items()
        ),
    ]
    run.__signature__ = inspect.Signature([*own, *flags_of(config)])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


COMMON: Flags = {
    "config": (
        Annotated[
            str | None,
            typer.Option(help="YAML file of these options, or the name of a shipped one (sdtune ls)."),
        ],
        None,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")],
        False,
    ),
}
FITTING: Flags = {
    "num_processes": (
        Annotated[
            int | None,
            typer.Option(min=1, help="Train on this many processes, a GPU each.", rich_help_panel="Launch"),
        ],
        None,
    ),
    "find_batch_size": (
        Annotated[
            bool,
            typer.Option(
                "--find-batch-size",
                help="Cut the images of a step into the largest batches that fit, the rest accumulated.",
                rich_help_panel="Launch",
            ),
        ],
        False,
    ),
    "memory": (
        Annotated[
            str | None,
            typer.Option(help="What a process may use, such as 8GB; none is all there is.", rich_help_panel="Launch"),
        ],
        None,
    ),
}
LAUNCH: Flags = FITTING | {
    "accelerate_config": (
        Annotated[
            str | None,
            typer.Option(
                help="Launch as this accelerate config says: a file, or the name of a shipped one (sdtune ls).",
                rich_help_panel="Launch",
            ),
        ],
        None,
    ),
    "overwrite": (
        Annotated[bool, typer.Option("--overwrite", help="Discard the run in output_dir.", rich_help_panel="Launch")],
        False,
    ),
    "allow_change": (
        Annotated[
            bool,
            typer.Option("--allow-change", help="Continue though config or data changed.", rich_help_panel="Launch"),
        ],
        False,
    ),
}


def flags_of(config: type[Section]) -> Iterator[inspect.Parameter]:
    """One Typer option per field. Values stay text: pydantic converts them, so that all mistakes come at once."""
    for name, field in parsing.by_section(config):
        spelt = parsing.flag(name)
        shown: dict[str, Any] = {
            "help": parsing.help_of(field),
            "rich_help_panel": parsing.title_of(config, name),
        }
        annotation: Any
        default: Any
        if field.annotation is bool:
            annotation, default, spelt = bool, bool(field.default), f"{spelt}/--no-{spelt[2:]}"
        else:
            annotation = list[str] if parsing.is_list(field) else str
            annotation, default = annotation | None, None
            shown["metavar"] = parsing.metavar(field)
        if place := parsing.positional(field):
            option = typer.Argument(metavar=place, help=shown["help"], show_default=False)
        else:
            option = typer.Option(spelt, show_default=False, **shown)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
        )


def train(words: list[str], entry: Callable[[], Any]) -> Callable[[Any, dict[str, Any]], None]:
    """What a training command does once its config is resolved; ``words`` are the command's own, as typed."""

    def work(cfg: Run, launching: dict[str, Any]) -> None:
        find, limit = launching.pop("find_batch_size", False), launching.pop("memory", None)
        launch = importlib.import_module("sdtune.training.launch")
        if find and launch.launched():
            raise UserError("--find-batch-size: give it without a launcher, with --num-processes")
        if find:
            importlib.import_module("sdtune.models.families").silence_libraries()
            world = launch.processes_of(cfg, launching)
            cfg = importlib.import_module("sdtune.training.batch_size").largest_batch(entry(), cfg, world, limit)
        elif limit:
            raise UserError("--memory: goes with --find-batch-size; `sdtune check` says whether a run fits as it is")
        code = launch.start(words, cfg, launching)
        if code is not None:
            raise typer.Exit(code)
        importlib.import_module("sdtune.models.families").silence_libraries()
        importlib.import_module("sdtune.training.loop").train(entry(), cfg, words, **launching)

    return work


def checked(_: list[str], entry: Callable[[], Any]) -> Callable[[Any, dict[str, Any]], None]:
    """What `check` does with the config of a training command."""

    def work(cfg: Run, launching: dict[str, Any]) -> None:
        importlib.import_module("sdtune.models.families").silence_libraries()
        importlib.import_module("sdtune.training.check").check(entry(), cfg, **launching)

    return work


def function(entry: str) -> Any:
    """What ``module:name`` stands for."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


checks = typer.Typer(no_args_is_help=True)
app.add_typer(
    checks,
    name="check",
    rich_help_panel="Look",
    help="Say what is wrong with a run and what it will cost, without training: sdtune check lora ...",
)
for method in METHODS:
    words, entry = [method.method], partial(function, method.entry)
    app.command(method.method, help=method.__doc__, context_settings=LENIENT, rich_help_panel="Train")(
        command(method, train(words, entry), LAUNCH)
    )
    checks.command(method.method, help=method.__doc__, context_settings=LENIENT)(
        command(method, checked(words, entry), FITTING)
    )


@app.command("run", context_settings=LENIENT | {"help_option_names": []}, rich_help_panel="Train")
def run_file(
    ctx: typer.Context, file: Annotated[Path, typer.Argument(help="Python file with one Recipe of your own.")]
) -> None:
    """Train a recipe of your own, from a Python file: same flags, resume, processes and report."""
    with_recipe(ctx, file, train, LAUNCH)


@checks.command("run", context_settings=LENIENT | {"help_option_names": []})
def check_file(
    ctx: typer.Context, file: Annotated[Path, typer.Argument(help="Python file with one Recipe of your own.")]
) -> None:
    """A recipe of your own, from a Python file."""
    with_recipe(ctx, file, checked, FITTING)


def with_recipe(ctx: typer.Context, file: Path, work: Callable[..., Any], beside: Flags) -> None:
    """Have ``work`` done with the recipe in ``file``, by the words that follow it."""
    if str(file) in ("-h", "--help"):  # after a file, --help is about that recipe's options
        typer.echo(ctx.get_help())
        return
    recipe = recipe_in(file)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    words = ["run", str(file)]
    alone.command(help=recipe.__doc__, context_settings=LENIENT)(
        command(recipe.Config, work(words, lambda: recipe), beside)
    )
    alone(parsing.canonical(recipe.Config, ctx.args), prog_name=f"{ctx.command_path} {file}")


def recipe_in(file: Path) -> Any:
    """The one Recipe class that a Python file defines."""
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{file}: not a Python file with a Recipe")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # loader workers find the class by this name
    spec.loader.exec_module(module)
    base = importlib.import_module("sdtune.recipes.recipe").Recipe
    own = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c.__module__ == file.stem]
    if len(own) != 1:
        raise UserError(f"{file}: wants exactly one class that derives from Recipe, found {len(own)}")
    return own[0]


def told(verb: type[Verb]) -> Callable[[Any, dict[str, Any]], None]:
    """What a verb's command does: call its function and print the line that it returns."""

    def work(cfg: Any, _: dict[str, Any]) -> None:
        if line := function(verb.entry)(cfg):
            typer.echo(line)

    return work


for verb in VERBS:
    app.command(verb.method, help=verb.__doc__, context_settings=LENIENT, rich_help_panel=verb.panel)(
        command(verb, told(verb), {})
    )


@app.command("ls", rich_help_panel="Look")
def list_recipes() -> None:
    """List what comes ready-made: recipes for --config, files for --accelerate-config, scripts for Slurm."""
    for title, files in {
        "Recipes, for --config": parsing.shipped(),
        "Launching, for --accelerate-config": parsing.ready_made("accelerate"),
        "Launching, for Slurm's sbatch (sdtune cp)": parsing.ready_made("slurm"),
    }.items():
        typer.echo(f"{title}:")
        for name, path in files.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            first = next(line for line in lines if not line.startswith("#!")).removeprefix("#").strip()
            typer.echo(f"  {name:<28} {first}")


@app.command("cp", rich_help_panel="Look")
def copy_recipe(name: str, to: Annotated[Path, typer.Argument(help="Folder or file.")] = Path()) -> None:
    """Copy a ready-made recipe, accelerate config or Slurm script to edit it."""
    source = parsing.found(name, "", parsing.shipped() | parsing.ready_made(*parsing.PLACES), "recipe")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists; name another file")
    target.write_bytes(source.read_bytes())
    kind = source.parent.name
    use = {"accelerate": f"sdtune lora --accelerate-config {target}", "slurm": f"sbatch {target} lora"}
    typer.echo(f"{target}: run it with `{use.get(kind, f'sdtune {kind} --config {target}')}`")


@app.command("env", rich_help_panel="Look")
def env() -> None:
    """Print versions and devices, for a bug report."""
    for name, value in importlib.import_module("sdtune.run.environment").environment().items():
        typer.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line: exit code 2 and a line per problem for the user's mistakes, 1 for a run that failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # `run.processes` reports a dead process in one line
    words = list(sys.argv[1:] if argv is None else argv)
    by_name: dict[str, type[Section]] = {c.method: c for c in METHODS}
    by_name |= {c.method: c for c in VERBS}
    try:
        start = int(words[:1] == ["check"])
        if config := by_name.get("".join(words[start : start + 1]).replace("_", "-")):
            words = words[:start] + parsing.canonical(config, words[start:])
        app(words, prog_name="sdtune")
    except UserError as error:
        told = str(error).rpartition("UserError: ")[2]  # a loader's worker wraps it in its whole traceback
        typer.echo(f"error: {told.rstrip()}", err=True)
        sys.exit(2)
    except RunFailed as error:
        told = str(error).rpartition("RunFailed: ")[2]
        typer.echo(f"failed: {told.rstrip()}", err=True)
        sys.exit(1)
