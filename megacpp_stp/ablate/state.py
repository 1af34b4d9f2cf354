"""What is to be done with each run of a matrix: begin it, go on with it, or keep what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megacpp_stp.ablate.cells import PlannedRun, of_cell
from megacpp_stp.ablate.code import require_this_code
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import Device
from megacpp_stp.plan.changes import check_changes
from megacpp_stp.runs.attempts import find_continuation, read_run_plan
from megacpp_stp.runs.begun import nothing_has_run
from megacpp_stp.runs.files import PLAN, exists_already, read_json, shown
from megacpp_stp.runs.folder import is_run
from megacpp_stp.runs.invalid import invalid_reason
from megacpp_stp.runs.receipt import read_receipt

_EDITED = "bring the matrix back to what these runs were made with, or name a new --run-dir"


class Step(StrEnum):
    """What is done with a run."""

    BEGIN = "begin"
    GO_ON = "go on"
    KEEP = "keep"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run and what is to be done with it.

    Attributes:
        run: The run.
        step: What is done.
        from_iteration: Of the checkpoint to go on from, 0 to begin anew in its directory; None for a new directory.
    """

    run: PlannedRun
    step: Step
    from_iteration: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is something to run."""
        return self.step in (Step.BEGIN, Step.GO_ON)


def device_of(directory: Path) -> Device | None:
    """What the runs that are there run on; None when there is none."""
    for path in sorted(directory.glob(f"*/*/{PLAN}")):
        return "cpu" if read_json(path).get("device") == "cpu" else "cuda"
    return None


def list_tasks(runs: Sequence[PlannedRun], *, directory: Path, resume: bool) -> tuple[Task, ...]:
    """What is to be done with each run. Changes nothing.

    Args:
        runs: All of the matrix.
        directory: Of the matrix.
        resume: Whether it may be there already.

    Raises:
        UserError: The directory is there and is not to be continued; a run in it is not the one that is planned, with
            the differences; or there is something left to run, and other code made what is there.
    """
    if not resume:
        if os.path.lexists(directory):
            raise exists_already(directory)
        return tuple(Task(run=run, step=Step.BEGIN) for run in runs)
    if not directory.is_dir():
        raise UserError(
            "is no directory", field="--run-dir", value=str(directory), fix="name the directory of the matrix"
        )
    if is_run(directory):
        raise UserError(
            "is a run and no matrix", field="--run-dir", value=str(directory), fix="go on with it by launch --resume"
        )
    found, edited = [], []
    for run in runs:
        try:
            found.append(_task(run))
        except _Edited as error:
            edited.append(error)
    if edited:
        first, *rest = edited
        more = f"\n  and {len(rest)} more runs: {', '.join(one.run.name for one in rest)}" if rest else ""
        raise UserError(f"{first.error.problem}{more}", field=f"cell {first.run.name}", fix=_EDITED)
    if any(task.is_open for task in found):
        kept, begun = (
            {task.run.name: task.run.directory for task in found if task.step is step}
            for step in (Step.KEEP, Step.GO_ON)
        )
        require_this_code(kept, begun)
    return tuple(found)


class _Edited(Exception):
    """A run was made with another plan."""

    def __init__(self, run: PlannedRun, error: UserError) -> None:
        super().__init__(str(error))
        self.run, self.error = run, error


def _task(run: PlannedRun) -> Task:
    directory = run.directory
    if not os.path.lexists(directory):
        return Task(run=run, step=Step.BEGIN)
    if nothing_has_run(directory):  # its launcher was killed as it began
        return Task(run=run, step=Step.BEGIN, from_iteration=0)
    wanted = run.plan.as_dict()
    try:
        if not is_run(directory):
            raise UserError(
                "holds no run", field=shown(directory), fix="move it away: nothing is written over what is there"
            )
        planned = read_run_plan(directory)
        try:
            check_changes(planned, wanted, allowed=False)
        except UserError as error:
            raise _Edited(run, error) from None
        if invalid_reason(directory) is not None:
            return Task(run=run, step=Step.INVALID)
        receipt = read_receipt(directory)
        if receipt["status"] == "complete" and receipt.get("iterations_done") == run.iterations:
            return Task(run=run, step=Step.KEEP)
        start = find_continuation(directory, wanted, may_change=False)
    except UserError as error:
        raise of_cell(error, run.name) from None
    assert start is not None, "a complete run"
    return Task(run=run, step=Step.GO_ON, from_iteration=start)


def strangers(runs: Sequence[PlannedRun], *, directory: Path) -> tuple[str, ...]:
    """Runs in the directory that are of no cell of the matrix, as CELL/SEED."""
    known = {run.directory for run in runs}
    there = sorted(path for path in directory.glob("*/*") if path.is_dir() and is_run(path))
    return tuple(str(path.relative_to(directory)) for path in there if path not in known)
