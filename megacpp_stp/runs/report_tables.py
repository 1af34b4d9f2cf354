"""The tables of a report, as rows of plain text. Whatever comes from a file is made printable and short here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import GROUPS
from megacpp_stp.runs.compare import Point, RunResult
from megacpp_stp.runs.files import EXIT, read_json, shown
from megacpp_stp.runs.likeness import likeness
from megacpp_stp.runs.opening import require_regular
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.report import WORDS, Report, values_of
from megacpp_stp.runs.what_ran import NONE, cell, what_ran

_GIB = 2**30
_SPEEDS = {"tflops_per_gpu": "TFLOP/s a GPU", "mfu": "MFU", "goodput": "goodput"}
_Row = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        columns: Headings.
        numbers: Which columns hold numbers, from 0.
        groups: Rows under a heading of their own; an empty heading for none.
    """

    columns: _Row
    numbers: frozenset[int]
    groups: tuple[tuple[str, tuple[_Row, ...]], ...]

    @property
    def rows(self) -> tuple[_Row, ...]:
        """All rows."""
        return tuple(row for _, rows in self.groups for row in rows)


def runs_table(report: Report) -> Table:
    """Each run over the window, and how it ended."""
    loss = WORDS[report.metric]
    speeds = {name: words for name, words in _SPEEDS.items() if any(values_of(run, name) for run in report.runs)}
    columns = (
        *("", "run", "seed", "STP weight", "in the window", f"mean {loss}", "best @ iteration", "last"),
        *("best validation @ iteration", "tokens/s", *speeds.values(), "peak memory", "exit"),
    )
    rows = tuple(
        _run_row(report, result, run, speeds=speeds) for result, run in zip(report.results, report.runs, strict=True)
    )
    return Table(columns=columns, numbers=frozenset((2, *range(5, len(columns) - 1))), groups=(("", rows),))


def _run_row(report: Report, result: RunResult, run: RecordedRun, *, speeds: Iterable[str]) -> _Row:
    weight = "none" if result.stp_weight is None else f"{result.stp_weight:g}"
    inside = _inside(report, run, "tokens_per_s")
    peaks = values_of(run, "peak_memory_bytes").values()
    return (
        result.arm,
        result.name,
        NONE if result.seed is None else cell(result.seed),
        weight if result.gate is None else f"{weight} from {result.gate}",
        ", ".join(f"{count} {regime}" for regime, count in result.regimes.items()) or NONE,
        number(result.mean),
        _point(result.best),
        number(result.last.value),
        _point(result.best_validation),
        f"{math.fsum(inside) / len(inside):,.0f}" if inside else NONE,
        *(_speed(report, run, name) for name in speeds),
        f"{max(peaks) / _GIB:,.2f} GiB" if peaks else NONE,
        _exit(run),
    )


def _inside(report: Report, run: RecordedRun, name: str) -> list[float]:
    """A value in the iterations of the window."""
    values = values_of(run, name)
    return [values[i] for i in report.window.iterations if i in values]


def _speed(report: Report, run: RecordedRun, name: str) -> str:
    """Mean over the window; of goodput, which is of all the run so far, the last."""
    inside = _inside(report, run, name)
    if not inside:
        return NONE
    if name == "goodput":
        return f"{inside[-1]:.1%}"
    mean = math.fsum(inside) / len(inside)
    if name == "mfu":
        return f"{mean:.1%}"
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def _exit(run: RecordedRun) -> str:
    reason = run.receipt["reason"]
    said = "complete" if run.is_complete else f"incomplete: {shown(reason) if reason else 'it does not say why'}"
    path = run.directory / EXIT
    try:
        require_regular(path)
        status = read_json(path).get("status")
    except UserError:  # a run that goes on has none yet
        return said
    return f"{said}, exit {status}" if type(status) is int and abs(status) < 2**31 else said


def differences_table(report: Report) -> Table:
    """What differs between the arms' first runs: plans, substrate, data; groups as ``megacpp-stp diff`` has them."""
    base, *others = (arm.runs[0] for arm in report.arms)
    by_group: dict[str, dict[str, dict[int, tuple[Any, Any]]]] = {}
    for place, run in enumerate(others):
        for item in likeness(base, run).differences:
            by_group.setdefault(item.group, {}).setdefault(item.path, {})[place] = (item.a, item.b)
    groups = []
    for group in (group for group in GROUPS if group in by_group):
        rows = []
        for path, found in by_group[group].items():
            mine = next(iter(found.values()))[0]
            rows.append((cell(path), *(cell(value) for value in (mine, *_sides(found, mine, len(others))))))
        groups.append((group, tuple(rows)))
    return Table(columns=_arm_columns(report), numbers=frozenset(), groups=tuple(groups))


def _sides(found: Mapping[int, tuple[Any, Any]], mine: Any, count: int) -> Iterator[Any]:
    for place in range(count):
        yield found[place][1] if place in found else mine


def facts_table(report: Report) -> Table:
    """What ran: a column for each arm, by its first run."""
    firsts = [arm.runs[0] for arm in report.arms]
    by_arm = [what_ran(run.receipt, run.side.plan) for run in firsts]
    rows = tuple((name, *(facts[name] for facts in by_arm)) for name in by_arm[0])
    return Table(columns=_arm_columns(report), numbers=frozenset(), groups=(("", rows),))


def _arm_columns(report: Report) -> _Row:
    return ("", *(f"{arm.letter} {arm.runs[0].name}" for arm in report.arms))


def number(value: float | None) -> str:
    """Five digits."""
    return NONE if value is None else minus(f"{value:.5g}")


def signed(value: float) -> str:
    """A difference."""
    return minus(f"{value:+.4g}")


def minus(text: str) -> str:
    """A number's text with a true minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def _point(point: Point | None) -> str:
    return NONE if point is None else f"{number(point.value)} @ {point.iteration}"
