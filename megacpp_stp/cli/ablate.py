"""``ablate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import Form, FormOption, console, print_json
from megacpp_stp.errors import UserError


def ablate_command(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.yaml", help="What is varied; see docs/ablate.md.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="A new directory for all runs; default runs/MATRIX-TIME.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or auto: cuda when each process has a GPU. Default cuda; to go on, the runs'."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they cost, and touch nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the matrix in --run-dir.")] = False,
    format: FormOption = Form.TABLE,
) -> None:
    """Run a matrix of variants and seeds, one run after the other, and say what each factor does."""
    from megacpp_stp.ablate.cells import plan_runs, processes_of
    from megacpp_stp.ablate.matrix import read_matrix
    from megacpp_stp.ablate.session import run_matrix
    from megacpp_stp.ablate.state import device_of, list_tasks
    from megacpp_stp.cli.ablate_tables import dry_run_facts, print_dry_run, print_outcome
    from megacpp_stp.training.preflight import resolve_device

    if resume and run_dir is None:
        fix = "name the directory of the matrix to go on with"
        raise UserError("is needed with --resume", field="--run-dir", fix=fix)
    wanted = read_matrix(matrix)
    place = run_dir or Path("runs") / f"{matrix.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    asked = device or (device_of(place) if resume else None) or "cuda"
    processes = processes_of(wanted, file=matrix) if asked == "auto" else 1
    chosen, why = resolve_device(asked, processes=processes)
    planned = plan_runs(wanted, file=matrix, device=chosen, directory=place)
    tasks = list_tasks(planned, directory=place, resume=resume)
    if dry_run:
        facts = dry_run_facts(wanted, tasks, directory=place)
        print_json(facts) if format is Form.JSON else print_dry_run(facts, console())
        return
    with _stdout_for(format):
        print(f"device: {chosen} ({why}); directory: {place}", flush=True)
        outcome = run_matrix(wanted, planned, tasks, directory=place, say=lambda line: print(line, flush=True))
    if format is Form.JSON:
        print_json(outcome.content)
    else:
        print_outcome(outcome, place, console())
    raise typer.Exit(outcome.status)


@contextmanager
def _stdout_for(format: Form) -> Iterator[None]:
    """With json, what the runs print goes to stderr: the answer is alone on stdout."""
    if format is not Form.JSON:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
