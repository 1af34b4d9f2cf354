"""``runs report``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import console


class Loss(StrEnum):
    """Losses that a report can be about."""

    LM_LOSS = "lm_loss"
    BITS_PER_BYTE = "bits_per_byte"


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories; the first is what others compare with."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write; a new file.")],
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Write the figures as PNG files there, too.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Iterations to compare; default: where STP has all of its weight."),
    ] = None,
    metric: Annotated[Loss, typer.Option(help="The loss to report.")] = Loss.LM_LOSS,
    allow_unlike: Annotated[
        bool,
        typer.Option("--allow-unlike", help="Compare runs of unlike machine, pattern, data...; the title says so."),
    ] = False,
) -> None:
    """Write one page on one run, or on several compared: curves, differences, STP by layer, tables."""
    from rich.text import Text

    from megacpp_stp.cli.runs_tables import print_invalid
    from megacpp_stp.runs.files import shown
    from megacpp_stp.runs.report import build_report
    from megacpp_stp.runs.report_files import png_paths, require_new, write_report
    from megacpp_stp.runs.report_ink import require_matplotlib
    from megacpp_stp.runs.window import parse_window

    wanted = None if window is None else parse_window(window)
    require_matplotlib()
    require_new([output], field="--output")
    require_new(png_paths(png) if png is not None else [], field="--png")
    report = build_report(runs, metric=metric.value, window=wanted, allow_unlike=allow_unlike)
    written = write_report(report, output=output, directory=png)
    out = console()
    for one in report.invalid:
        print_invalid(f"{one.name}: {one.reason}", out)
    out.print(Text(report.title))
    for path in written:
        out.print(Text(f"written: {shown(path)}"))
