"""``runs watch``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megacpp_stp.runs.watch import Watch


def watch_command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory; of a folder, the run that was written to last.")
    ],
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture and end; so it is where the output is no terminal.")
    ] = False,
) -> None:
    """Watch a run while it goes on: progress, losses, straightness, speed, memory. Ctrl-C ends the watching only."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from megacpp_stp.cli.options import console
    from megacpp_stp.errors import UserError
    from megacpp_stp.runs.files import shown
    from megacpp_stp.runs.watch import Life, pick_run

    watch = _follow(run, None)
    terminal = Console(highlight=False)
    if once or not terminal.is_terminal:
        if watch is None:
            fix = "name the folder that `launch` made, or the one that it lies in"
            raise UserError("is neither a run directory nor a folder of them", field=shown(run), fix=fix)
        out = console()
        out.print(watch.frame(out.width))
        return
    is_folder = pick_run(run) != run
    try:
        with Live(console=terminal, auto_refresh=False) as live:
            while True:
                watch = _follow(run, watch)
                nothing = Text(f"no run in {shown(run)} yet")
                live.update(nothing if watch is None else watch.frame(terminal.width), refresh=True)
                # In a folder another run may begin.
                if watch is not None and not is_folder and watch.life in (Life.COMPLETE, Life.ENDED):
                    return
                time.sleep(interval)
    except KeyboardInterrupt:
        return


def _follow(run: Path, watch: Watch | None) -> Watch | None:
    """A look at the run to watch, which in a folder may be another than before."""
    from megacpp_stp.runs.watch import Watch, pick_run

    found = pick_run(run)
    if found is not None and (watch is None or watch.directory != found):
        watch = Watch(found)
    if watch is not None:
        watch.look()
    return watch
