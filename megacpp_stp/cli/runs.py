"""``runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import Form, FormOption, console, print_json
from megacpp_stp.cli.runs_report import report_command
from megacpp_stp.cli.runs_watch import watch_command

app = typer.Typer(help="Look at what runs left, and compare it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at what runs left, and compare it."""


@app.command("show")
def show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of them.")],
    format: FormOption = Form.TABLE,
) -> None:
    """Show one run - losses before and after the gate, speed, parameters - or all runs in a folder."""
    from megacpp_stp.cli.runs_tables import print_folder, print_invalid
    from megacpp_stp.runs.folder import is_run, list_folder
    from megacpp_stp.runs.invalid import invalid_reason
    from megacpp_stp.runs.summary import print_summary, print_what_ran, summarise

    if run.is_dir() and not is_run(run):
        found = list_folder(run)
        print_json(found) if format is Form.JSON else print_folder(found, console())
        return
    invalid = invalid_reason(run)
    if invalid is not None:
        marked = {"directory": str(run), "status": "INVALID", "invalid": invalid}
        print_json(marked) if format is Form.JSON else print_invalid(invalid, console())
    elif format is Form.JSON:
        print_json({**summarise(run), "invalid": None})
    else:
        out = console()
        print_what_ran(run, out)
        print_summary(run, out)


@app.command("compare")
def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories; the first is what others compare with.")
    ],
    window: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Iterations to compare; default: where STP has all of its weight."),
    ] = None,
    metric: Annotated[str, typer.Option(help="A name in metrics.jsonl; one tap's as stp_loss_by_tap.6.")] = "lm_loss",
    allow_unlike: Annotated[
        bool,
        typer.Option("--allow-unlike", help="Compare runs of unlike machine, pattern, data...; the title says so."),
    ] = False,
    assert_equal: Annotated[
        bool, typer.Option("--assert-equal", help="Prove that the runs are bit-identical; exit status 1 if not.")
    ] = False,
    format: FormOption = Form.TABLE,
) -> None:
    """Compare runs, iteration by iteration, where what differs between them acts."""
    from megacpp_stp.cli.runs_tables import print_comparison, print_equality
    from megacpp_stp.errors import UserError
    from megacpp_stp.runs.compare import compare_runs
    from megacpp_stp.runs.equality import check_equal
    from megacpp_stp.runs.window import parse_window

    wanted = None if window is None else parse_window(window)
    if assert_equal:
        if metric != "lm_loss" or allow_unlike:
            raise UserError(
                "looks at all metrics, and at any two runs",
                field="--assert-equal",
                fix="leave --metric and --allow-unlike out",
            )
        equalities = check_equal(runs, window=wanted)
        if format is Form.JSON:
            print_json([found.as_dict() for found in equalities])
        else:
            print_equality(equalities, console())
        raise typer.Exit(int(not all(found.equal for found in equalities)))
    comparison = compare_runs(runs, metric=metric, window=wanted, allow_unlike=allow_unlike)
    if format is Form.JSON:
        print_json(comparison.as_dict())
    else:
        print_comparison(comparison, console())


app.command("report")(report_command)
app.command("watch")(watch_command)


@app.command("invalidate")
def invalidate_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What is wrong with it, in a sentence.")],
) -> None:
    """Mark a run as one that nothing may be concluded from. Its receipt stays as it is."""
    from megacpp_stp.runs.files import shown
    from megacpp_stp.runs.invalid import invalidate

    marked = invalidate(run, reason)
    print(f"{shown(run)} is INVALID{'' if marked else ' already'}: {reason}")
