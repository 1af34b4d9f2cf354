"""The commands put together, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import typer

from megacpp_stp import __version__
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import shown_lines

# Where each command is: its module, and the function or the group of commands in it.
_COMMANDS = {
    "list": ("plan", "list_command"),
    "plan": ("plan", "plan_command"),
    "check": ("check", "check_command"),
    "diff": ("diff", "diff_command"),
    "memory": ("memory", "memory_command"),
    "launch": ("launch", "launch_command"),
    "ablate": ("ablate", "ablate_command"),
    "doctor": ("doctor", "doctor_command"),
    "patches": ("patches", "app"),
    "bench": ("bench", "app"),
    "data": ("data", "app"),
    "runs": ("runs", "app"),
}


def build_app(names: Iterable[str] = tuple(_COMMANDS)) -> typer.Typer:
    """The program with some of its commands; only their modules are imported."""
    app = typer.Typer(
        name="megacpp-stp",
        help="Train the NAM hybrid language models on Megatron-Core, with STP under every pipeline layout.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        callback=_options,
    )
    for name in names:
        module, attribute = _COMMANDS[name]
        command: Any = getattr(import_module(f"megacpp_stp.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of every command."""


def run(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program.

    Returns:
        The exit status; see `megacpp_stp.cli.main`.
    """
    try:
        # Standalone mode: typer itself turns usage errors into a message and status 2, whatever its version.
        app = build_app(argv[:1]) if argv and argv[0] in _COMMANDS else build_app()
        app(list(argv), prog_name="megacpp-stp")
    except UserError as error:
        print(shown_lines(f"megacpp-stp: {error}"), file=sys.stderr)
        return 2
    except PermissionError as error:
        fix = "mend its permissions, or name another place"
        refused = UserError("permission denied", field=str(error.filename), fix=fix)
        print(shown_lines(f"megacpp-stp: {refused}"), file=sys.stderr)
        return 2
    except OSError as error:
        print(shown_lines(f"megacpp-stp: {error}"), file=sys.stderr)  # a full disk, most likely
        return 1
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
