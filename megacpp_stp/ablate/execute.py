"""Running the open runs of a matrix, one after the other, each through the product's own launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megacpp_stp.ablate.cells import of_cell
from megacpp_stp.ablate.state import Step, Task
from megacpp_stp.errors import UserError
from megacpp_stp.patches.registry import code_hash
from megacpp_stp.runs.files import METRICS, RECEIPT
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.watch import clock
from megacpp_stp.training.launcher import Launch

Say = Callable[[str], None]
_SIGNAL = 128
INTERRUPTED = 130  # SIGINT, as a shell says it


@dataclass(slots=True, kw_only=True)
class Ended:
    """How the open runs of a matrix ended.

    Attributes:
        stopped: Exit status of the run that stopped the matrix, 128 + n for a signal; None when all were tried.
        failed: Names of runs that ended early on their own.
    """

    stopped: int | None = None
    failed: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """For the shell."""
        return self.stopped if self.stopped is not None else int(bool(self.failed))


def launch_of(task: Task) -> Launch:
    """The launch of a run."""
    return Launch(plan=task.run.plan, run_dir=task.run.directory, from_iteration=task.from_iteration)


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse a matrix of which this machine cannot run a cell, before its first run starts.

    The first open run of each cell is judged as its launch will judge it; the others differ in their seeds.

    Raises:
        UserError: What is missing or does not fit, with the cell.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.is_open and task.run.cell not in seen:
            seen.add(task.run.cell)
            try:
                launch_of(task).preflight()
            except UserError as error:
                raise of_cell(error, task.run.cell) from None


def run_tasks(tasks: Sequence[Task], *, say: Say, after_each: Callable[[], None]) -> Ended:
    """Run what is open, in order.

    A signal stops the matrix, with the run that it ended marked incomplete. So does a run that ends before its first
    iteration: what ended it would end the others, too. One that ends later is left, and the others run.

    Args:
        tasks: From `list_tasks`, checked by `check_tasks`.
        say: Takes a line on how it goes.
        after_each: Called when a run has ended.

    Raises:
        UserError: What a launch refuses, with the run; or the code was changed meanwhile.
    """
    ended, code = Ended(), code_hash()
    waiting = [task for task in tasks if task.is_open]
    seconds: list[float] = []
    for done, task in enumerate(waiting, start=1):
        say(f"[{done}/{len(waiting)}] {task.run.name}: {_beginning(task)}")
        before = time.monotonic()
        try:
            status = _launch(task, code=code)
        except KeyboardInterrupt:  # between two runs, or while one is being checked
            ended.stopped = INTERRUPTED
            return ended
        seconds.append(time.monotonic() - before)
        after_each()
        say(f"[{done}/{len(waiting)}] {task.run.name}: {_ending(task, status, seconds, left=len(waiting) - done)}")
        if status:
            ended.failed.append(task.run.name)
            if status > _SIGNAL or not _came_to_iterate(task):
                ended.stopped = status
                return ended
    return ended


def _launch(task: Task, *, code: str) -> int:
    launch = launch_of(task)
    try:
        if code_hash() != code:
            raise UserError(
                "of megacpp-stp was changed since this start began: its runs would be no one matrix",
                field="code",
                fix="bring it back as it was and go on by --resume, or begin anew",
            )
        launch.preflight()
    except UserError as error:
        raise of_cell(error, task.run.name) from None
    return launch.run()


def _came_to_iterate(task: Task) -> bool:
    path = task.run.directory / METRICS
    return path.exists() and path.stat().st_size > 0


def _beginning(task: Task) -> str:
    if task.step is Step.BEGIN:
        return "begins"
    return f"goes on from iteration {task.from_iteration}" if task.from_iteration else "begins anew"


def _ending(task: Task, status: int, seconds: Sequence[float], *, left: int) -> str:
    took = clock(seconds[-1])
    if status:
        told = read_receipt(task.run.directory) if (task.run.directory / RECEIPT).exists() else {"reason": None}
        said = f"ended with status {status} after {took}: {told['reason']}"
    else:
        said = f"complete in {took}"
    if not left:
        return said
    return f"{said}; {left} left, about {clock(left * sum(seconds) / len(seconds))} at the speed so far"
