"""ablation.json and report.html: what a matrix leaves beside its runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_stp.ablate.cells import PlannedRun
from megacpp_stp.ablate.contrast import Runs
from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.ablate.own_page import put_page
from megacpp_stp.ablate.page import matrix_page
from megacpp_stp.ablate.verdict import Verdict
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import RECEIPT, write_json
from megacpp_stp.runs.invalid import invalid_reason
from megacpp_stp.runs.receipt import read_receipt

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


def write_page(matrix: Matrix, runs: Runs, verdict: Verdict, *, directory: Path) -> str:
    """Write report.html, or renew the one that an earlier start wrote, so that it says what the runs say now.

    Args:
        matrix: What was wanted.
        runs: Its complete runs, by cell and seed.
        verdict: What they say.
        directory: Of the matrix.

    Returns:
        A line on it: where it is, or why there is none.
    """
    path = directory / PAGE
    try:
        put_page(path, matrix_page(matrix, runs, verdict))
    except UserError as error:
        return f"no page: {error.problem}" + (f" ({error.fix})" if error.fix else "")
    return f"page: {path}"


def renew_page(matrix: Matrix, runs: Runs, verdict: Verdict, *, directory: Path) -> None:
    """Bring the page of an earlier start up to date, where there is one."""
    if os.path.lexists(directory / PAGE):
        write_page(matrix, runs, verdict, directory=directory)
