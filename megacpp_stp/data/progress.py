"""Progress on a console: bars on a terminal, a line per quarter elsewhere, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """Is told what a job does."""

    def stage(self, name: str, *, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a stage of `total` units; the yielded function is called with the units just done."""
        ...


class SilentReporter:
    """Reports nothing."""

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Open a stage."""
        yield lambda done: None


class LineReporter:
    """Prints a line when a stage begins and at each quarter of it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Open a stage."""
        done = quarter = 0

        def advance(units: int) -> None:
            nonlocal done, quarter
            done += units
            if total and done * 4 // total > quarter:
                quarter = done * 4 // total
                self._print(f"{name}: {25 * quarter}%")

        self._print(name)
        yield advance

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarReporter:
    """Draws a bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Open a stage."""
        # A stage of one unit has nothing to count: the bar pulses until it is done.
        task = self._bars.add_task(name, total=total if total > 1 else None)
        yield lambda units: self._bars.advance(task, units)
        self._bars.update(task, total=max(total, 1), completed=max(total, 1))


@contextmanager
def console_reporter(console: Console) -> Iterator[Reporter]:
    """Yield the reporter that suits a console."""
    if not console.is_terminal:
        yield LineReporter(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield BarReporter(bars)
