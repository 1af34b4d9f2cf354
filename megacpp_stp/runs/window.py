"""The iterations that a comparison is about: those in which what differs acts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_stp.errors import UserError
from megacpp_stp.runs.gate import ACTIVE, DORMANT, WARMING, Gate
from megacpp_stp.runs.recorded import RecordedRun

_FIELD = "--window"
_WRITTEN = re.compile(r"(\d{0,15}):(\d{0,15})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A window as a user writes it.

    Attributes:
        first: First iteration; None for the first there is.
        last: Last iteration, itself in it; None for the last there is.
    """

    first: int | None
    last: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The window of a comparison.

    Attributes:
        iterations: Those in which each run has a value, rising.
        why: How it was chosen.
    """

    iterations: tuple[int, ...]
    why: str

    @property
    def first(self) -> int:
        """Its first iteration."""
        return self.iterations[0]

    @property
    def last(self) -> int:
        """Its last iteration."""
        return self.iterations[-1]


def parse_window(text: str) -> Wanted:
    """Read FIRST:LAST, either of which may be left out.

    Raises:
        UserError: Something else, or an empty window.
    """
    written = _WRITTEN.fullmatch(text)
    first, last = (int(part) if part else None for part in written.groups()) if written else (None, None)
    if (first is None and last is None) or first == 0 or last == 0 or (first and last and first > last):
        raise UserError(
            "is no window of iterations, which count from 1",
            field=_FIELD,
            value=text,
            fix="write FIRST:LAST, FIRST: or :LAST, such as 1000:2000",
        )
    return Wanted(first=first, last=last)


def choose_window(common: Sequence[int], *, runs: Sequence[RecordedRun], in_stp: bool, wanted: Wanted | None) -> Window:
    """The iterations to compare.

    Args:
        common: Iterations in which each run has a value, rising.
        runs: The runs that are compared.
        in_stp: Whether they differ in STP: then only iterations with all of its weight count, in each run that has it.
        wanted: The user's; None for the rule above.

    Raises:
        UserError: No iteration is left.
    """
    if not common:
        raise UserError("have no iteration in common", field="RUN", fix="compare runs that went through the same ones")
    if wanted is not None:
        first, last = wanted.first or common[0], wanted.last or common[-1]
        inside = tuple(iteration for iteration in common if first <= iteration <= last)
        if not inside:
            raise UserError(
                f"holds none of the iterations that all runs have: {common[0]} to {common[-1]}",
                field=_FIELD,
                value=f"{first}:{last}",
                fix=f"choose from {common[0]}:{common[-1]}",
            )
        return Window(iterations=inside, why="as asked for")
    acting = [run for run in runs if run.gate is not None and run.gate.acts] if in_stp else []
    if not acting:
        return Window(iterations=tuple(common), why="all that the runs have in common")
    for regimes, why in (
        ((ACTIVE,), "STP has all of its weight in each run that has it"),
        (
            (ACTIVE, WARMING),
            "STP acts in each run that has it, with a part of its weight only: a run ended on the ramp",
        ),
    ):
        live = tuple(
            iteration for iteration in common if all(_gate(run).regime_at(iteration) in regimes for run in acting)
        )
        if live:
            return Window(iterations=live, why=why)
    latest = max(acting, key=lambda run: _gate(run).first_live)
    raise UserError(
        f"the runs have iterations {common[0]} to {common[-1]} in common, all before the gate of {latest.name}: "
        f"it opens at iteration {_gate(latest).first_live}",
        field=_FIELD,
        fix="train on, or leave this run out; before its gate a run is one without STP, as --assert-equal shows",
    )


def require_live(window: Window, *, runs: Sequence[RecordedRun]) -> None:
    """Refuse to compare runs that differ in STP where it acts in none of them.

    Raises:
        UserError: With the iteration from which it does.
    """
    acting = [run for run in runs if run.gate is not None and run.gate.acts]
    if any(_gate(run).regime_at(window.last) != DORMANT for run in acting):
        return
    names = " and ".join(run.name for run in runs)
    if not acting:
        raise UserError(
            f"{names} differ in STP, which acts in neither: its weight is 0",
            field="stp.weight",
            fix="use --assert-equal, which shows that they are one run",
        )
    first = min(_gate(run).first_live for run in acting)
    raise UserError(
        f"lies wholly before the gate, where {names} differ in nothing: it opens at iteration {first}",
        field=_FIELD,
        value=f"{window.first}:{window.last}",
        fix=f"use --window {first}:, or --assert-equal to show that they are equal before the gate",
    )


def _gate(run: RecordedRun) -> Gate:
    assert run.gate is not None
    return run.gate
