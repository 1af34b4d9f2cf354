"""ablation.json and report.html: what a matrix leaves beside its runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_stp.ablate.cells import PlannedRun
from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.ablate.verdict import Verdict
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import RECEIPT, write_json
from megacpp_stp.runs.invalid import invalid_reason
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.report import build_report
from megacpp_stp.runs.report_files import write_report
from megacpp_stp.runs.report_ink import require_matplotlib
from megacpp_stp.runs.window import Wanted

ABLATION, PAGE = "ablation.json", "report.html"
ABLATION_FORMAT = 1


def as_dict(
    matrix: Matrix, planned: Sequence[PlannedRun], verdict: Verdict | None, *, directory: Path
) -> dict[str, Any]:
    """A matrix, its runs and, where there is one, its verdict as plain data."""
    rows = [_row(run, directory) for run in planned]
    done = verdict is not None and all(row["status"] == "complete" for row in rows)
    return {
        "ablation_format": ABLATION_FORMAT,
        "status": "complete" if done else "incomplete",
        "matrix": matrix.model_dump(mode="json"),
        "baseline": name_of({factor: matrix.baseline[factor] for factor in matrix.factors}),
        "device": planned[0].plan.device,
        "runs": rows,
        "verdict": verdict and verdict.as_dict(),
    }


def _row(run: PlannedRun, directory: Path) -> dict[str, Any]:
    status, reason = "not run", None
    if (run.directory / RECEIPT).exists():
        try:
            receipt = read_receipt(run.directory)
            status, reason = receipt["status"], receipt["reason"]
        except UserError as error:
            status, reason = "unreadable", error.problem
    if (invalid := invalid_reason(run.directory)) is not None:
        status, reason = "INVALID", invalid
    return {
        "cell": run.cell,
        "seed": run.seed,
        "directory": str(run.directory.relative_to(directory)),
        "plan_digest": run.plan.digest,
        "status": status,
        "reason": reason,
    }


def write_record(content: dict[str, Any], directory: Path) -> None:
    """Write ablation.json, whole or not at all; the one of an earlier start is replaced, as a receipt is."""
    write_json(directory / ABLATION, content)


def write_page(matrix: Matrix, planned: Sequence[PlannedRun], verdict: Verdict, *, directory: Path) -> str:
    """Write report.html on all runs, once the matrix is complete.

    Returns:
        A line on it: where it is, or why there is none.
    """
    path = directory / PAGE
    if os.path.lexists(path):
        return f"page: {path}, as it was written before"
    if verdict.refused is not None or verdict.missing or verdict.window is None:
        return "no page: it is written when all runs are complete"
    base = [run for run in planned if run.levels == matrix.baseline]
    others = [run for run in planned if run.levels != matrix.baseline]
    try:
        require_matplotlib()
        report = build_report(
            [run.directory for run in (*base, *sorted(others, key=lambda run: run.cell))],
            metric=matrix.metric,
            window=Wanted(first=verdict.window.first, last=verdict.window.last),
            # What the matrix did not ask for is refused before; the page says in its title what it did ask for.
            allow_unlike=True,
        )
        write_report(report, output=path, directory=None)
    except UserError as error:
        return f"no page: {error.problem}" + (f" ({error.fix})" if error.fix else "")
    return f"page: {path}"
