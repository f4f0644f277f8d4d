"""The command line: one file per verb, loaded when it is used."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mcsharp_sdk import __version__
from mcsharp_sdk.cli.streams import lossy_streams
from mcsharp_sdk.errors import McSharpError

VERBS = {
    "check": "Check a recipe, and whether it fits a model.",
    "plan": "Show what a run would do, its size and its memory, without doing it.",
    "compress": "Compress a model as a recipe says.",
    "sweep": "Run variants of a recipe and compare quality and cost.",
    "allocate": "Solve for bit widths from a factor file alone.",
    "evaluate": "Measure perplexity, bits and bytes of models, or run tasks on them.",
    "report": "Write a page with pictures of a run, or of several.",
    "inspect": "Show what is in a compressed model.",
    "export": "Write a compressed model in another form.",
    "recipes": "List, show and copy the recipes that come with mcsharp.",
    "schema": "Print the JSON Schema of recipes, for editors.",
    "demo": "Compress the model that comes with mcsharp, and compare.",
}
"""Verb -> one line of help. The verb's function has its name, in the module of its name here."""

SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "2000"
"""How often a thread of torch's OpenMP looks for work before it sleeps."""

DEBUG_VARIABLE = "MCSHARP_DEBUG"
DEBUG_OPTION = "--debug"
OFF = ("", "0", "false")
"""Values of a variable that turn off what it stands for, in any case."""

_SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


class VerbGroup(TyperGroup):
    """Shows all verbs without importing any, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


def _load(verb: str) -> Any:
    found = getattr(import_module(f"mcsharp_sdk.cli.{verb}"), verb)
    if isinstance(found, typer.Typer):
        return get_command(found)
    single = typer.Typer(**_SETTINGS)
    single.command(verb)(found)
    return get_command(single)


app = typer.Typer(
    cls=VerbGroup,
    name="mcsharp",
    help="Mixed-precision compression of Mixture-of-Experts models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_SETTINGS,
)


def _stand_in() -> None:
    """Takes a verb's place in the list of verbs until it is called."""


for _verb, _help in VERBS.items():
    app.command(_verb, help=_help)(_stand_in)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mcsharp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_OPTION, help="Show where in the code an error came from.")
    ] = False,
) -> None:
    """Options before the verb; ``run`` has dealt with --debug already."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed while running, 2 bad input, 130 interrupted.

    ``--debug`` may stand anywhere among the arguments.
    """
    _share_processors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_OPTION in given or os.environ.get(DEBUG_VARIABLE, "").lower() not in OFF
    sys.exit(_run([a for a in given if a != DEBUG_OPTION], debug))


def _share_processors() -> None:
    """Let idle threads sleep soon, unless the user chose; OpenMP asks when torch is imported.

    By default they spin for milliseconds, and beside other busy processes each step of a model
    waits for one that spins in another's place.
    """
    if not any(variable in os.environ for variable in SPIN_VARIABLES):
        os.environ[SPIN_VARIABLES[0]] = SPINS


def _run(arguments: list[str], debug: bool) -> int:
    """The exit code, which also says whether what there was to print could be printed."""
    with lossy_streams() as output:
        code = _exit_code(arguments, debug)
        output.flush()
        if output.error is None or code:
            return code
        why = output.error.strerror
        _tell(f"the result is complete, but standard output could not be written: {why}", False)
        return 1


def _exit_code(arguments: list[str], debug: bool) -> int:
    try:
        app(args=arguments, prog_name="mcsharp")
    except McSharpError as error:
        _tell(str(error), debug)
        return error.exit_code
    except SystemExit as end:
        return _code(end)
    except KeyboardInterrupt:
        _tell("interrupted", debug)
        return 130
    except Exception as error:
        _tell(_unforeseen(error), debug)
        return 1
    return 0


def _unforeseen(error: Exception) -> str:
    from mcsharp_sdk.engine.obstacles import disk_obstacle

    if isinstance(error, OSError) and (obstacle := disk_obstacle(error)):
        return f"{obstacle}, then run the same command again"
    how = f"run again with {DEBUG_OPTION}, or {DEBUG_VARIABLE}=1, for the traceback"
    return f"{type(error).__name__}: {error} ({how})"


def _code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    sys.stderr.write(f"{end.code}\n")
    return 1


def _tell(message: str, debug: bool) -> None:
    from mcsharp_sdk.cli.output import print_error

    if debug:
        traceback.print_exc()
    print_error(message)
