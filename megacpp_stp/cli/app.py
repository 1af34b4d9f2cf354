"""The commands put together, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from megacpp_stp import __version__
from megacpp_stp.cli import check, data, diff, launch, memory, plan, runs
from megacpp_stp.errors import UserError

app = typer.Typer(
    name="megacpp-stp",
    help="Train the NAM hybrid language models on Megatron-Core, with STP under every pipeline layout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(plan.list_command)
app.command("plan")(plan.plan_command)
app.command("check")(check.check_command)
app.command("diff")(diff.diff_command)
app.command("memory")(memory.memory_command)
app.command("launch")(launch.launch_command)
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
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
        app(list(argv), prog_name="megacpp-stp")
    except UserError as error:
        print(f"megacpp-stp: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"megacpp-stp: {error}", file=sys.stderr)  # a full disk, most likely
        return 1
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
