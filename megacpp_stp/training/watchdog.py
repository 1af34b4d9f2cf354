"""A run that hangs ends itself, and says which rank waits where.

On each rank a thread looks at the marks of `megacpp_stp.training.progress`. Where none has come for too long it writes
where this rank is, lets the others know through the run directory so that they do the same, and ends the process;
torchrun ends the rest. A rank that cannot run this thread writes no report, and is told by that. One whose interpreter
is blocked is ended by `megacpp_stp.training.sentinel`, which the thread has to remind that it lives, and which has its
stacks written before: by a signal that faulthandler handles, which needs no interpreter.

Time in which a process was stopped counts nowhere: neither of the two sees it pass. That is why faulthandler's own
timer is not used: it sees it, and reads the stacks while the process goes on, which may end it by SIGSEGV. What was
written of a rank that comes on all the same is dropped.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megacpp_stp.plan.health import slow_minutes
from megacpp_stp.runs.failures import error_file, report_failure
from megacpp_stp.runs.hangs import HangReport, announce, have_reported, is_announced, stacks_file, write_report
from megacpp_stp.training.progress import Mark, Progress
from megacpp_stp.training.sentinel import STACKS, Sentinel
from megacpp_stp.training.stacks import position

_BLOCKED = "the interpreter is blocked: native code keeps Python's lock, or a file cannot be reached"
_STUCK = "it hangs, and so does what it reports to"
_STAYS = "its work was done, and its process did not end"
_STDERR = 2


class Hang(Exception):
    """A rank came no further."""

    kind = "hang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds.

    Attributes:
        usual: Without progress until a rank is taken to hang.
        slow: The same where something happens that may take long.
        look: Between two looks at the marks.
        grace: Until a rank that has reported ends, so that the others can report too.
    """

    usual: float
    slow: float
    look: float
    grace: float

    @classmethod
    def of(cls, hang_minutes: float) -> Limits:
        """Those of a recipe's ``training.health.hang_minutes``."""
        usual = 60.0 * hang_minutes
        return cls(
            usual=usual,
            slow=60.0 * slow_minutes(hang_minutes),
            look=min(2.0, usual / 8),
            grace=min(15.0, max(3.0, usual / 2)),
        )

    def at(self, mark: Mark) -> float:
        """Until a rank that has come to `mark` hangs."""
        return self.slow if mark.slow else self.usual


class Stall:
    """How long a mark has stood still, as far as it was watched.

    A process that was stopped and goes on has not been watched meanwhile: a longer gap between two looks counts as
    the longest that it may be.

    Args:
        longest: Gap between two looks, in seconds.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._mark: Mark | None = None
        self._seconds = self._last = 0.0

    def after(self, mark: Mark, *, now: float) -> float:
        """Seconds, after a look.

        Args:
            mark: What was seen.
            now: When, on a clock that only goes on.
        """
        stood = mark is self._mark
        self._seconds = self._seconds + min(now - self._last, self._longest) if stood else 0.0
        self._mark, self._last = mark, now
        return self._seconds


class Watchdog:
    """Watches this process from `__enter__` to `__exit__`.

    Args:
        directory: The run directory.
        rank: Of this process.
        world_size: How many there are.
        progress: What its main thread marks.
        limits: From `Limits.of`.
        place: Returns its coordinates in the layout; empty before there is one.
        dump: Writes down what its communicators did, where something keeps that.
        to_the_end: Whether the process ends after `__exit__`, and is to be ended where it does not.
        end: Ends the process at once, with a status.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        world_size: int,
        progress: Progress,
        limits: Limits,
        place: Callable[[], Mapping[str, int]] = dict,
        dump: Callable[[], None] = lambda: None,
        to_the_end: bool = False,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._directory = directory
        self._rank = rank
        self._world_size = world_size
        self._progress = progress
        self._limits = limits
        self._place = place
        self._dump = dump
        self._to_the_end = to_the_end
        self._end = end
        # Among others it is for these to notice a rank that keeps silent, and to say where they wait for it.
        self._margin = 4 * limits.look + (4 * limits.grace if world_size > 1 else 0.0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks = -1
        self._sentinel: Sentinel | None = None

    def __enter__(self) -> Self:
        # Open from the start: a blocked interpreter opens nothing.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._stacks = os.open(self._directory / stacks_file(self._rank), flags, 0o644)
        # Ignored before faulthandler has it and after: what asks for stacks must end nobody.
        signal.signal(STACKS, signal.SIG_IGN)
        faulthandler.register(STACKS, file=self._stacks, all_threads=True)
        told = self._directory.resolve() / error_file(self._rank)
        self._sentinel = Sentinel(told, rank=self._rank, tick=min(1.0, self._limits.look / 2))
        self._arm(self._limits.at(self._progress.mark))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._to_the_end:  # communicators, workers and threads are taken down from here on
            faulthandler.register(STACKS, file=_STDERR, all_threads=True)
            self._lease(self._limits.slow, _STAYS, stacks_after=self._limits.slow / 2)
        else:
            faulthandler.unregister(STACKS)
            if self._sentinel is not None:
                self._sentinel.dismiss()
        os.close(self._stacks)
        (self._directory / stacks_file(self._rank)).unlink(missing_ok=True)

    def _watch(self) -> None:
        stall = Stall(4 * self._limits.look)
        while not self._stopped.wait(self._limits.look):
            mark = self._progress.mark
            stalled = stall.after(mark, now=time.monotonic())
            if stalled >= self._limits.at(mark):
                self._hang(mark, stalled, noticed=True)
            elif is_announced(self._directory):
                self._hang(mark, stalled, noticed=False)
            else:
                self._arm(self._limits.at(mark) - stalled)

    def _arm(self, left: float) -> None:
        """Have the stacks written, and the process ended, if this thread does not come back in time.

        Args:
            left: Seconds until this thread would say that the rank hangs.
        """
        if os.fstat(self._stacks).st_size:  # it did come back
            os.ftruncate(self._stacks, 0)
        # Also where what happens now may take long: it may be over, and the next thing block, before the next look.
        soon = min(left, self._limits.usual) / 2
        self._lease(left + self._margin, _BLOCKED, stacks_after=max(soon, 2 * self._limits.look))

    def _lease(self, seconds: float, why: str, stacks_after: float | None = None) -> None:
        if self._sentinel is not None:
            self._sentinel.lease(seconds, why=why, stacks_after=stacks_after)

    def _hang(self, mark: Mark, stalled: float, *, noticed: bool) -> None:
        """Report, wait for the others' reports, and end. What it writes to may be what hangs: it ends all the same."""
        self._lease(4 * self._limits.grace, _STUCK)
        report = self._report(mark, stalled)
        with suppress(OSError):
            write_report(self._directory, report)
            if noticed and not is_announced(self._directory):
                announce(self._directory, rank=self._rank)
            self._say(report, noticed=noticed)
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        with suppress(Exception):  # a record more, for which nothing may fail
            self._dump()
        error = Hang(f"stopped or waits {report.text}, {stalled:.0f} s without progress")
        report_failure(self._directory, rank=self._rank, error=error)
        deadline = time.monotonic() + self._limits.grace
        while have_reported(self._directory, self._world_size) < self._world_size and time.monotonic() < deadline:
            time.sleep(min(0.1, self._limits.look))
        self._end(1)

    def _report(self, mark: Mark, stalled: float) -> HangReport:
        found = position()
        return HangReport(
            rank=self._rank,
            world_size=self._world_size,
            place=dict(self._place()),
            phase=mark.phase,
            iteration=mark.iteration,
            microbatch=mark.microbatch,
            seconds=round(stalled, 1),
            collective=found.collective,
            where=found.where,
            frames=found.frames,
        )

    def _say(self, report: HangReport, *, noticed: bool) -> None:
        """Past Python's streams, whose locks the main thread may hold."""
        why = f"no progress for {report.seconds:.0f} s" if noticed else "another rank makes no progress"
        os.write(2, f"megacpp-stp: rank {self._rank}: {why}; this rank is {report.text}\n".encode())
