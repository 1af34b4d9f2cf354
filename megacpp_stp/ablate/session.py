"""One start of a matrix: check, run what is open, judge, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.ablate.cells import PlannedRun
from megacpp_stp.ablate.contrast import Runs
from megacpp_stp.ablate.execute import INTERRUPTED, Ended, Say, check_tasks, run_tasks
from megacpp_stp.ablate.matrix import Matrix
from megacpp_stp.ablate.record import as_dict, renew_page, write_page, write_record
from megacpp_stp.ablate.state import Task, strangers
from megacpp_stp.ablate.verdict import Verdict, complete_runs, judge_runs
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import create_run_directory
from megacpp_stp.runs.lock import launcher_lock

_MISTAKE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a start came to.

    Attributes:
        status: For the shell: 0; 1 when a run is not complete or there is no verdict; 2 for a mistake of the user;
            128 + n after signal n.
        failed: Names of runs that ended early.
        verdict: What the complete runs say.
        content: The same with the matrix and its runs, as in ablation.json.
        page: A line on the HTML page.
    """

    status: int
    failed: tuple[str, ...]
    verdict: Verdict
    content: dict[str, Any]
    page: str


def run_matrix(
    matrix: Matrix, planned: Sequence[PlannedRun], tasks: Sequence[Task], *, directory: Path, say: Say
) -> Outcome:
    """Run what is open, judge what is complete, and write both down.

    Args:
        matrix: What is wanted.
        planned: All of its runs.
        tasks: What is to be done with each.
        directory: Of the matrix; made where it is not there. Nothing in it is overwritten but ablation.json and the
            page that an earlier start wrote.
        say: Takes lines on how it goes.

    Raises:
        UserError: What a launch refuses, before anything is written; or another start is going on there.
    """
    try:
        check_tasks(tasks)
    except KeyboardInterrupt:  # without the lock nothing is written
        return _outcome(matrix, planned, Ended(stopped=INTERRUPTED), directory=directory, write=False)
    if not directory.exists():
        create_run_directory(directory)

    def record() -> None:
        write_record(as_dict(matrix, planned, None, directory=directory), directory)

    with launcher_lock(directory):
        record()
        if any(task.is_open for task in tasks):
            # A page of an earlier start would claim for hours what is no longer so.
            renew_page(matrix, *_judged(matrix, planned), directory=directory)
        for name in strangers(planned, directory=directory):
            say(f"{name} is of no cell of this matrix: left out")
        try:
            ended = run_tasks(tasks, say=say, after_each=record)
        except UserError:
            _outcome(matrix, planned, Ended(stopped=_MISTAKE), directory=directory, write=True)
            raise
        return _outcome(matrix, planned, ended, directory=directory, write=True)


def _judged(matrix: Matrix, planned: Sequence[PlannedRun]) -> tuple[Runs, Verdict]:
    runs, missing = complete_runs(planned)
    return runs, judge_runs(matrix, runs, missing=missing)


def _outcome(matrix: Matrix, planned: Sequence[PlannedRun], ended: Ended, *, directory: Path, write: bool) -> Outcome:
    runs, verdict = _judged(matrix, planned)
    content = as_dict(matrix, planned, verdict, directory=directory)
    page = "nothing was written"
    if write:
        write_record(content, directory)
        page = write_page(matrix, runs, verdict, directory=directory)
    # What was marked INVALID is missing because a person wants it to be.
    is_lacking = verdict.refused is not None or any(
        row["status"] not in ("complete", "INVALID") for row in content["runs"]
    )
    return Outcome(
        status=ended.status or int(is_lacking),
        failed=tuple(ended.failed),
        verdict=verdict,
        content=content,
        page=page,
    )
