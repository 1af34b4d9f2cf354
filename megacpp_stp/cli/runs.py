"""``runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import Form, FormOption, console, print_json

app = typer.Typer(help="Look at what runs left.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at what runs left."""


@app.command("show")
def show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    format: FormOption = Form.TABLE,
) -> None:
    """Show one run: losses before and after the gate, speed, parameters."""
    from megacpp_stp.runs.summary import print_summary, summarise

    if format is Form.JSON:
        print_json(summarise(run))
        return

    print_summary(run, console())
