"""The command line: one command per config, one flag per field, and the verbs around them.

``--help`` reads the table of commands alone. A command's options are built when it is asked for, and nothing slow is
imported before they are valid: a typing mistake, ``--help`` and ``--dry-run`` answer before torch is loaded.
"""

import errno
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sdtune import __version__
from sdtune.config import commands
from sdtune.config.commands import METHODS, VERBS
from sdtune.config.errors import RunFailed, UserError
from sdtune.config.help_style import Command, Group
from sdtune.config.slow_imports import imported, importing
from sdtune.config.untrusted import CONTROL, echo, printable
from sdtune.run.allocator import tune_malloc

if TYPE_CHECKING:
    from sdtune.config.command_line import OptionCommand
    from sdtune.config.sections import Launch, Machine, Run

app = typer.Typer(
    name="sdtune",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune diffusion models: sdtune lora --dataset FOLDER --rank 4, then sdtune sample.",
)
checks = typer.Typer(cls=Group, no_args_is_help=True)
app.add_typer(
    checks,
    name="check",
    rich_help_panel="Look",
    help="Say what is wrong with a run and what it will cost, without training: sdtune check lora ...",
)


def print_version(wanted: bool) -> None:
    if wanted:
        echo(f"sdtune {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def top(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=print_version, help="Print the version."),
    ] = False,
) -> None: ...


# ---- what the commands do ------------------------------------------------------------------------------


def train(words: list[str], entry: Callable[[], Any], cfg: "Run", launch: "Launch") -> None:
    """Train a recipe, here or on the processes that are asked for; ``words`` are the command as it is typed."""
    tune_malloc()  # before there is a tensor
    launcher = importlib.import_module("sdtune.training.launch")
    if launch.find_batch_size and launcher.launched():
        raise UserError("--find-batch-size: give it without a launcher, with --num-processes")
    if launch.memory and not launch.find_batch_size:
        raise UserError("--memory: goes with --find-batch-size; `sdtune check` says whether a run fits as it is")
    if launch.find_batch_size:
        importlib.import_module("sdtune.models.families").silence_libraries()
        world = launcher.processes_of(cfg, launch)
        cfg = importlib.import_module("sdtune.training.batch_size").largest_batch(entry(), cfg, world, launch.memory)
    code = launcher.start(words, cfg, launch)
    if code is not None:
        raise typer.Exit(code)
    with importing():
        importlib.import_module("sdtune.models.families").silence_libraries()
        loop, recipe = importlib.import_module("sdtune.training.loop"), entry()
    loop.train(recipe, cfg, words, overwrite=launch.overwrite, allow_change=launch.allow_change)


def check(_: list[str], entry: Callable[[], Any], cfg: "Run", machine: "Machine") -> None:
    """Print what is wrong with a run and what it will cost."""
    with importing():
        importlib.import_module("sdtune.models.families").silence_libraries()
        checker, recipe = importlib.import_module("sdtune.training.check"), entry()
    checker.check(recipe, cfg, machine.num_processes, machine.memory, machine.find_batch_size)


def call(entry: str, cfg: Any, _: Any) -> None:
    """Call the function of a command that does not train, and print the line that it returns."""
    with importing():
        work = imported(entry)
    if line := work(cfg):
        echo(line)


def training(name: str, command: commands.Command) -> "OptionCommand":
    from sdtune.config import command_line, sections

    config: Any = command.load()
    work = partial(train, [name], partial(imported, config.entry))
    return command_line.OptionCommand(name, config, sections.Launch, work)


def checking(name: str, command: commands.Command) -> "OptionCommand":
    from sdtune.config import command_line, sections

    config: Any = command.load()
    work = partial(check, [name], partial(imported, config.entry))
    return command_line.OptionCommand(name, config, sections.Machine, work)


def verb(name: str, command: commands.Command) -> "OptionCommand":
    from sdtune.config import command_line, sections

    config: Any = command.load()
    return command_line.OptionCommand(name, config, sections.Options, partial(call, config.entry))


class ListedCommand(Command):
    """A command as --help lists it, whose options are built when it is called."""

    def __init__(self, name: str, command: commands.Command, build: Callable[[str, commands.Command], "OptionCommand"]):
        super().__init__(name, help=command.summary, rich_help_panel=command.panel)
        self.build = partial(build, name, command)

    @cached_property
    def built(self) -> "OptionCommand":
        return self.build()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.built.context(args, parent)


# ---- a recipe of one's own -----------------------------------------------------------------------------

OWN = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""The words after the file are the options of its recipe."""


@app.command("run", cls=Command, context_settings=OWN, rich_help_panel="Train")
def run_file(
    ctx: typer.Context, file: Annotated[Path, typer.Argument(help="Python file with one Recipe of your own.")]
) -> None:
    """Train a recipe of your own, from a Python file: same flags, resume, processes and report."""
    from sdtune.config.sections import Launch

    with_recipe(ctx, file, train, Launch)


@checks.command("run", cls=Command, context_settings=OWN)
def check_file(
    ctx: typer.Context, file: Annotated[Path, typer.Argument(help="Python file with one Recipe of your own.")]
) -> None:
    """A recipe of your own, from a Python file."""
    from sdtune.config.sections import Machine

    with_recipe(ctx, file, check, Machine)


def with_recipe(ctx: typer.Context, file: Path, work: Callable[..., None], launch: "type[Machine]") -> None:
    """Have ``work`` done with the recipe in ``file``, by the words that follow it."""
    from sdtune.config.command_line import OptionCommand

    if str(file) in ("-h", "--help"):  # after a file, --help is about that recipe's options
        typer.echo(ctx.get_help())
        return
    recipe = recipe_in(file)
    own = partial(work, ["run", str(file)], lambda: recipe)
    command = OptionCommand(str(file), recipe.Config, launch, own, inspect.getdoc(recipe))
    with command.context(ctx.args, ctx.parent) as inner:
        inner.command.invoke(inner)


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


# ---- what comes ready-made -----------------------------------------------------------------------------


@app.command("ls", cls=Command, rich_help_panel="Look")
def list_recipes() -> None:
    """List what comes ready-made: recipes for --config, files for --accelerate-config, scripts for Slurm."""
    from sdtune.config import shipped

    for title, files in {
        "Recipes, for --config": shipped.recipes(),
        "Launching, for --accelerate-config": shipped.ready_made("accelerate"),
        "Launching, for Slurm's sbatch (sdtune cp)": shipped.ready_made("slurm"),
    }.items():
        echo(f"{title}:")
        for name, path in files.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            first = next(line for line in lines if not line.startswith("#!")).removeprefix("#").strip()
            echo(f"  {name:<28} {first}")


@app.command("cp", cls=Command, rich_help_panel="Look")
def copy_recipe(name: str, to: Annotated[Path, typer.Argument(help="Folder or file.")] = Path()) -> None:
    """Copy a ready-made recipe, accelerate config or Slurm script to edit it."""
    from sdtune.config import shipped

    source = shipped.found(name, "", shipped.recipes() | shipped.ready_made(*shipped.PLACES), "recipe")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists; name another file")
    target.write_bytes(source.read_bytes())
    kind = source.parent.name
    use = {"accelerate": f"sdtune lora --accelerate-config {target}", "slurm": f"sbatch {target} lora"}
    echo(f"{target}: run it with `{use.get(kind, f'sdtune {kind} --config {target}')}`")


@app.command("env", cls=Command, rich_help_panel="Look")
def env() -> None:
    """Print versions and devices, for a bug report."""
    for name, value in importlib.import_module("sdtune.run.environment").environment().items():
        echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


# ---- the line --------------------------------------------------------------------------------------------


def make_group() -> TyperGroup:
    """The commands of the line, those of configs before the others."""
    group: Any = typer.main.get_command(app)
    listed = {name: ListedCommand(name, command, training) for name, command in METHODS.items()}
    listed |= {name: ListedCommand(name, command, verb) for name, command in VERBS.items()}
    group.commands = listed | group.commands
    checked = group.commands["check"]
    checked.commands = {
        name: ListedCommand(name, command._replace(panel=""), checking) for name, command in METHODS.items()
    } | checked.commands
    made: TyperGroup = group
    return made


group = make_group()


def main(argv: list[str] | None = None) -> None:
    """Run the command line: exit code 2 and a line per problem for the user's mistakes, 1 for a run that failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # `run.processes` reports a dead process in one line
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if strange := next(filter(CONTROL.search, words), None):
            why = "not UTF-8 text" if re.search("[\ud800-\udfff]", strange) else "holds control characters"
            raise UserError(f"{printable(strange)}: {why}")
        group(words, prog_name="sdtune")
    except UserError as error:
        message = str(error).rpartition("UserError: ")[2]  # a loader's worker wraps it in its whole traceback
        echo(f"error: {message.rstrip()}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        echo(f"error: {str(error.filename)[:60]}...: the file name is too long", err=True)
        sys.exit(2)
    except RunFailed as error:
        message = str(error).rpartition("RunFailed: ")[2]
        echo(f"failed: {message.rstrip()}", err=True)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        device = importlib.import_module("sdtune.run.device")
        if not device.is_out_of_memory(error):
            raise
        echo(f"failed: {device.out_of_memory(error, device.best_device())}", err=True)
        sys.exit(1)
