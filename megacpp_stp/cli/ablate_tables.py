"""What ``ablate`` prints for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacpp_stp.ablate.cost import flops_of, seconds_left, tokens_of
from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.ablate.session import Outcome
from megacpp_stp.ablate.state import Task
from megacpp_stp.ablate.verdict import CellResult
from megacpp_stp.ablate.words import difference_words, interval_words, verdict_words
from megacpp_stp.plan.parameters import count, parts
from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.watch import clock

DRY_RUN_FORMAT = 1
_LOUD = "bold white on red"


def dry_run_facts(matrix: Matrix, tasks: Sequence[Task], *, directory: Path) -> dict[str, Any]:
    """What would run, as plain data."""
    return {
        "dry_run_format": DRY_RUN_FORMAT,
        "directory": str(directory),
        "device": tasks[0].run.plan.device,
        "baseline": name_of({factor: matrix.baseline[factor] for factor in matrix.factors}),
        "metric": matrix.metric,
        "window": matrix.window,
        "seconds_left": seconds_left(tasks),
        "runs": [
            {
                "cell": task.run.cell,
                "seed": task.run.seed,
                "step": task.step.value,
                "from_iteration": task.from_iteration,
                "iterations": task.run.iterations,
                "plan_digest": task.run.plan.digest,
                "parameters": count(parts(task.run.plan.recipe, task.run.plan.layout)).total,
                "tokens": tokens_of(task.run),
                "flops": flops_of(task.run),
            }
            for task in tasks
        ],
    }


def print_dry_run(facts: Mapping[str, Any], console: Console) -> None:
    """Print `dry_run_facts`."""
    table = Table()
    table.add_column("cell")
    for column in ("seed", "parameters", "iterations", "tokens", "TFLOPs"):
        table.add_column(column, justify="right")
    for column in ("plan", "step"):
        table.add_column(column)
    for run in facts["runs"]:
        step = run["step"]
        if run["from_iteration"] is not None:
            step = f"goes on from {run['from_iteration']}" if run["from_iteration"] else "begins anew"
        table.add_row(
            Text(run["cell"]),
            str(run["seed"]),
            f"{run['parameters']:,}",
            str(run["iterations"]),
            f"{run['tokens']:,}",
            f"{run['flops'] / 1e12:,.1f}",
            run["plan_digest"][:12],
            step,
        )
    console.print(table)
    waiting = [run for run in facts["runs"] if run["step"] in ("begin", "go on")]
    total = sum(run["flops"] for run in waiting) / 1e12
    console.print(Text(f"to run: {len(waiting)} of {len(facts['runs'])}, {total:,.1f} TFLOPs, on {facts['device']}"))
    if facts["seconds_left"] is not None:
        console.print(Text(f"about {clock(facts['seconds_left'])} at the speed of the runs that are complete"))
    else:
        console.print(Text("how long that takes is known once a run is complete"))
    console.print(Text(f"compared with {facts['baseline']}; directory: {facts['directory']}"))


def print_outcome(outcome: Outcome, directory: Path, console: Console) -> None:
    """Print what a matrix came to."""
    verdict = outcome.verdict
    for line in verdict.missing:
        console.print(Text(line, style=_LOUD if " is INVALID: " in line else "red"))
    if verdict.refused is not None or verdict.window is None:
        console.print(Text(f"no verdict: {verdict.refused}", style=_LOUD))
    else:
        window = verdict.window
        title = f"{verdict.metric}, iterations {window.first} to {window.last}"
        console.print(Text(title, style="bold"))
        console.print(Text(f"{counted(len(window.iterations))}: {window.why}"))
        console.print(_cells(verdict.cells))
        for sentence in verdict.sentences:
            console.print(Text(sentence, style="bold"))
        for note in verdict.notes:
            console.print(Text(f"note: {note}"))
    console.print(Text(f"{directory / 'ablation.json'}; {outcome.page}"))
    if outcome.failed or verdict.open:
        console.print(Text(f"go on: megacpp-stp ablate MATRIX.yaml --resume --run-dir {directory}"))


def _cells(cells: Sequence[CellResult]) -> Table:
    table = Table()
    table.add_column("cell")
    for column in ("seeds", "mean", "spread over seeds", "against the baseline", f"{CONFIDENCE:.0%} interval"):
        table.add_column(column, justify="right")
    for column in ("", "stands on"):
        table.add_column(column)
    for cell in cells:
        table.add_row(
            *map(Text, (cell.name, str(len(cell.seeds)), _number(cell.mean), _number(cell.spread))), *_pair(cell)
        )
    return table


def _pair(cell: CellResult) -> list[Text]:
    found = cell.against_baseline
    if found is None:
        return [Text("baseline"), Text("-"), Text("-"), Text("-")]
    if found.refused is not None:
        return [Text("-"), Text("-"), Text(found.verdict), Text(found.refused)]
    return [*map(Text, (difference_words(found), interval_words(found), verdict_words(found), found.standing))]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
