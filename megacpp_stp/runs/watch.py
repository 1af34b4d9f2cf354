"""A run while it goes on: what its files say, and one picture of it for a terminal. Nothing is written."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from megacpp_stp.errors import UserError
from megacpp_stp.runs.alive import NOT_SEEN, has_ended, launcher_is_there
from megacpp_stp.runs.files import METRICS, PLAN, RECEIPT, shown
from megacpp_stp.runs.folder import is_run
from megacpp_stp.runs.gate import ACTIVE, DORMANT, WARMING, Gate, gate_of
from megacpp_stp.runs.invalid import invalid_reason
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.sparkline import History, sparkline
from megacpp_stp.runs.tail import Tail, numbers_of

_RECENT = 20  # steps whose speed is taken for that of the rest
_SILENT_S = 30.0
_SILENT_STEPS = 10
_LAST_ITERATION = 2**53
_GIB = 2**30
_FAMILY = "stp_straightness_by_family."
_LARGE = 1e9  # beyond, digits would not fit
_WIDEST = 60  # columns of a sparkline
_LABEL, _NOW, _RANGE = 14, 11, 21
_WITH_RANGE, _WITH_LINE = 72, 40  # columns of a terminal from which these are shown
_RULER = {DORMANT: "\N{MIDDLE DOT}", WARMING: "╱", ACTIVE: "═"}
_ROWS = (
    ("lm loss", "lm_loss", "{:.5g}"),
    ("bits a byte", "bits_per_byte", "{:.5g}"),
    ("STP loss", "stp_loss", "{:.5g}"),
    ("straight", _FAMILY, "{:.4g}"),  # a row for each family
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("TFLOP/s a GPU", "tflops_per_gpu", "{:.4g}"),
    ("MFU", "mfu", "{:.3g}"),
    ("goodput", "goodput", "{:.3g}"),
    ("skipped", "skipped_iterations", "{:.6g}"),
    ("grad norm", "grad_norm", "{:.4g}"),
    ("memory, GiB", "peak_memory_bytes", "{:.4g}"),
)


class Life(StrEnum):
    """How a run is doing."""

    WAITING = "waiting for its first file"
    RUNNING = "running"
    UNSEEN = "incomplete"
    SILENT = "silent"
    DIED = "died"
    ENDED = "ended early"
    COMPLETE = "complete"


_STYLES = {
    Life.COMPLETE: "bold green",
    Life.RUNNING: "bold cyan",
    Life.DIED: "bold white on red",
    Life.ENDED: "bold red",
}


def pick_run(path: Path) -> Path | None:
    """The run to watch: the one named; of a folder, or of a folder of folders, that which was written to last.

    Returns:
        None for a folder without a run.

    Raises:
        UserError: There is no such directory.
    """
    try:
        if not path.is_dir():
            raise UserError("is no directory", field=shown(path), fix="name a run directory, or a folder of runs")
        if is_run(path):
            return path
        for pattern in ("*", "*/*"):  # a matrix has its runs one folder deeper
            found = [place for place in path.glob(pattern) if place.is_dir() and is_run(place)]
            if found:
                return max(found, key=lambda place: (_touched(place), place.name))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field=shown(path), fix="mend its permissions") from None
    return None


def _touched(directory: Path) -> float:
    """When a run last wrote something."""
    times = [0.0]
    for name in (METRICS, RECEIPT, PLAN):
        try:
            times.append((directory / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a look at the run found, beside its history.

    Attributes:
        life: How it is doing.
        said: More on that; empty where there is no more.
        receipt: None before there is a readable one.
        trouble: Files that cannot be read, each with why.
        invalid: Why nothing may be concluded from it; None when nobody said so.
    """

    life: Life
    said: str
    receipt: Mapping[str, Any] | None
    trouble: tuple[str, ...]
    invalid: str | None


class Watch:
    """Follows one run.

    Args:
        directory: Its directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tail = Tail(directory / METRICS)
        self._forget()
        self._facts = Facts(life=Life.WAITING, said="", receipt=None, trouble=(), invalid=None)

    def _forget(self) -> None:
        self._history = History()
        self._names: dict[str, tuple[float, float]] = {}
        self._now: dict[str, float] = {}
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._damaged = 0

    @property
    def life(self) -> Life:
        """How the run is doing, as of the last look."""
        return self._facts.life

    def look(self) -> None:
        """Read what is new. A file that cannot be read is part of the picture, and no error."""
        trouble = []
        try:
            news = self._tail.look()
        except (UserError, OSError) as error:
            trouble.append(_first_line(error))
        else:
            if news.from_start:
                self._forget()
            self._damaged += news.damaged
            for record in news.records:
                self._take(record["iteration"], numbers_of(record))
        there = launcher_is_there(self.directory)  # before the receipt, which has the end before the lock is free
        receipt = None
        if (self.directory / RECEIPT).exists():
            try:
                receipt = read_receipt(self.directory)
            except (UserError, OSError) as error:
                trouble.append(_first_line(error))
        life, said = self._life(receipt, there)
        self._facts = Facts(
            life=life,
            said=said,
            receipt=receipt,
            trouble=tuple(trouble),
            invalid=invalid_reason(self.directory),
        )

    def _take(self, iteration: int, numbers: dict[str, float]) -> None:
        self._history.add(iteration, numbers)
        self._now = numbers
        for name, value in numbers.items():
            low, high = self._names.get(name, (value, value))
            self._names[name] = (min(low, value), max(high, value))
        if (step := numbers.get("step_time_s", 0.0)) > 0:
            self._steps.append(step)

    def _life(self, receipt: dict[str, Any] | None, there: bool | None) -> tuple[Life, str]:
        if receipt is not None and has_ended(receipt):
            complete = receipt["status"] == "complete"
            return (Life.COMPLETE, "") if complete else (Life.ENDED, shown(receipt["reason"] or "it does not say why"))
        if receipt is None and not self._history.last:
            return Life.WAITING, ""
        silence = time.time() - _touched(self.directory)
        step = math.fsum(self._steps) / len(self._steps) if self._steps else 0.0
        if silence < max(_SILENT_S, _SILENT_STEPS * step):
            return (Life.UNSEEN, NOT_SEEN) if there is False else (Life.RUNNING, "")
        since = f"no sign of life for {clock(silence)}"
        if there is False:
            return Life.DIED, f"{since}, and its launcher is gone (or on a machine whose locks are not seen here)"
        return (
            Life.SILENT,
            f"{since}; its launcher is there" if self._steps else "it has not come to its first iteration",
        )

    def frame(self, width: int) -> Group:
        """The picture, in lines of at most `width` columns."""
        lines = list(self._lines(max(width, 1)))
        for line in lines:
            line.no_wrap = True
            line.truncate(max(width, 1), overflow="ellipsis")
        return Group(*lines)

    def _lines(self, width: int) -> Iterator[Text]:
        facts = self._facts
        if facts.invalid is not None:
            yield Text(f"INVALID: {facts.invalid}", style="bold white on red")
        recipe = shown(facts.receipt["recipe"]["name"]) if facts.receipt else ""
        yield Text(f"{shown(self.directory)}  {recipe}".rstrip(), style="bold")
        yield Text(f"{facts.life}{f': {facts.said}' if facts.said else ''}", style=_STYLES.get(facts.life, ""))
        resumed = [attempt["from_iteration"] for attempt in (facts.receipt or {}).get("attempts", [])[1:]]
        if resumed:
            yield Text(f"attempt {len(resumed) + 1}, went on from iteration {shown(resumed[-1])}")
        for line in facts.trouble:
            yield Text(line, style="red")
        if self._damaged:
            yield Text(f"lines that are no record: {self._damaged}", style="red")
        planned = (facts.receipt or {}).get("iterations_planned")
        known = type(planned) is int and 0 < planned < _LAST_ITERATION
        yield Text(self._progress(planned if known else None, width))
        gate = self._gate()
        if gate is not None:
            yield Text(self._gate_words(gate))
        if self._history.last:
            yield from self._table(gate, width)

    def _progress(self, planned: int | None, width: int) -> str:
        done = self._history.last
        if planned is None:
            return f"iteration {done}"
        text = f"iteration {done}/{planned}, {min(done / planned, 1.0):.0%}"
        left = planned - done
        if left > 0 and self._steps and self._facts.life in (Life.RUNNING, Life.UNSEEN, Life.SILENT):
            text += f", {clock(left * math.fsum(self._steps) / len(self._steps))} left (steps alone)"
        room = min(width - len(text) - 2, _WIDEST)
        filled = round(min(done / planned, 1.0) * room)
        return f"{text}  {'━' * filled}{'─' * (room - filled)}" if room >= 10 else text

    def _gate(self) -> Gate | None:
        try:
            return gate_of(self._facts.receipt, field="") if self._facts.receipt else None
        except UserError:
            return None

    def _gate_words(self, gate: Gate) -> str:
        if not gate.acts:
            return "STP: measured, weight 0"
        done, opens = self._history.last, gate.first_live
        what = f"STP: weight {gate.weight:g} from iteration {opens}"
        if done < opens:
            return f"{what}, in {opens - done}"
        return f"{what}: {gate.regime_at(done)}"

    def _table(self, gate: Gate | None, width: int) -> Iterator[Text]:
        room = width - _LABEL - _NOW - 2 - (_RANGE + 2 if width >= _WITH_RANGE else 0)
        columns = min(room, _WIDEST) if width >= _WITH_LINE else 0
        if gate is not None and gate.acts and columns > 0:
            # The regime in which each column begins: where it changes is the gate.
            ruler = "".join(_RULER[gate.regime_at(first)] for first in self._history.iterations(columns))
            yield Text(f"{'':{_LABEL + _NOW}}  {ruler}  · before the gate ╱ warming ═ active")
        for label, name, form in _ROWS:
            for key in sorted(known for known in self._names if known.startswith(name)) if name == _FAMILY else [name]:
                if key in self._names or key == "lm_loss":
                    suffix = f" {shown(key.removeprefix(_FAMILY))}" if name == _FAMILY else ""
                    yield Text(self._row(label + suffix, key, form, columns=columns, with_range=width >= _WITH_RANGE))

    def _row(self, label: str, name: str, form: str, *, columns: int, with_range: bool) -> str:
        def written(value: float) -> str:
            scaled = value / _GIB if name == "peak_memory_bytes" else value
            return form.format(scaled) if abs(scaled) < _LARGE else f"{scaled:.3g}"

        value = self._now.get(name)
        now = "-" if value is None else written(value)
        text = f"{label[:_LABEL]:<{_LABEL}}{now:>{_NOW}}"
        if columns > 0:
            line = sparkline(self._history.columns(name, columns))
            text += f"  {line:<{min(columns, self._history.count(columns))}}"
        if with_range and name in self._names:
            low, high = map(written, self._names[name])
            text += f"  {low} to {high}" if low != high else f"  {low}"
        return text


def _first_line(error: UserError | OSError) -> str:
    return shown(str(error).splitlines()[0])


def clock(seconds: float) -> str:
    """A duration as people say it: 75 is 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
