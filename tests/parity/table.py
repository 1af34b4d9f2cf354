"""The errors that each cell reaches. ``python -m tests.parity.table [NAME ...]`` prints them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from tests.parity._gloo import Layout, run_ranks
from tests.parity.cell import Cell
from tests.parity.cells import CELLS, cell
from tests.parity.cuts import whole_of
from tests.parity.gradients import schedule_outcomes
from tests.parity.plain import plain_outcomes
from tests.parity.side import Outcome

Errors = dict[str, float]
_BATCH = 8  # cells of one start at most: the first test of a batch waits for all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell against plain autograd in one process.

    Attributes:
        name: The cell's.
        ranks: Number of processes.
        gradient: Largest relative error of a parameter's gradient, in the 2-norm.
        worst: That parameter.
        parameter: Largest relative error of a parameter after the steps; None where the cell has none.
        loss: Largest error of a tap's STP loss.
    """

    name: str
    ranks: int
    gradient: float
    worst: str
    parameter: float | None
    loss: float


@cache
def _truths(quick: bool) -> dict[str, Outcome]:
    """Plain autograd's outcomes for the quick cells or for the others, from one process."""
    plain = {repr(chosen.plain): chosen.plain for chosen in CELLS if chosen.quick is quick}
    return dict(zip(plain, run_ranks(plain_outcomes, 1, list(plain.values()), timeout=1200)[0], strict=True))


def truth_of(chosen: Cell) -> Outcome:
    """Plain autograd's outcome; cells of one model and data share it."""
    return _truths(chosen.quick)[repr(chosen.plain)]


def relative_errors(copies: Iterable[tuple[str, Tensor]], truth: dict[str, Tensor]) -> Errors:
    """The largest relative error of each name's copies.

    Raises:
        AssertionError: Not all of the truth was found, or more.
    """
    errors: Errors = defaultdict(float)
    for name, found in copies:
        errors[name] = max(errors[name], ((found - truth[name]).norm() / truth[name].norm()).item())
    assert errors.keys() == truth.keys()
    return dict(errors)


def whole_copies(ranks: Sequence[Outcome], what: str) -> list[tuple[str, Tensor]]:
    """Each copy of each gradient or parameter (`what` names the field), put together from tensor-parallel parts."""
    parts = defaultdict(list)
    copies = []
    for rank in ranks:
        for name, value in getattr(rank, what).items():
            cut = rank.cuts[name]
            if cut is None:
                copies.append((name, value))
            else:
                parts[name, rank.replica].append((cut, value))
    for (name, _), found in parts.items():
        found.sort(key=lambda part: part[0].rank)
        cut = found[0][0]
        assert [part.rank for part, _ in found] == list(range(cut.size)), name
        copies.append((name, whole_of([value for _, value in found], cut)))
    return copies


def gradient_errors(ranks: Sequence[Outcome], truth: Outcome) -> Errors:
    """Relative errors of the gradients by parameter."""
    return relative_errors(whole_copies(ranks, "gradients"), truth.gradients)


@cache
def _outcomes(quick: bool, layout: Layout, world_size: int, batch: int) -> dict[str, list[Outcome]]:
    """What each rank found, by cell; starting the ranks costs more than most cells, so that some share them."""
    cells = _alike(quick, layout, world_size)[batch * _BATCH : (batch + 1) * _BATCH]
    ranks = run_ranks(schedule_outcomes, world_size, cells, layout=layout, timeout=120.0 * len(cells))
    return {chosen.name: list(found) for chosen, found in zip(cells, zip(*ranks, strict=True), strict=True)}


def _alike(quick: bool, layout: Layout, world_size: int) -> list[Cell]:
    wanted = quick, layout, world_size
    return [chosen for chosen in CELLS if (chosen.quick, chosen.layout, chosen.world_size) == wanted]


def outcomes_of(chosen: Cell) -> list[Outcome]:
    """What each rank of a cell found."""
    alike = chosen.quick, chosen.layout, chosen.world_size
    return _outcomes(*alike, _alike(*alike).index(chosen) // _BATCH)[chosen.name]


def row_of(chosen: Cell) -> Row:
    """The errors of a cell."""
    ranks, truth = outcomes_of(chosen), truth_of(chosen)
    gradients = gradient_errors(ranks, truth)
    worst = max(gradients, key=lambda name: gradients[name])
    parameter = None
    if not chosen.double:
        parameter = max(relative_errors(whole_copies(ranks, "parameters"), truth.parameters).values())
    return Row(
        name=chosen.name,
        ranks=chosen.world_size,
        gradient=gradients[worst],
        worst=worst,
        parameter=parameter,
        loss=max(abs(rank.losses[tap] - truth.losses[tap]) for rank in ranks for tap in chosen.taps),
    )


def render(rows: Iterable[Row]) -> Iterable[str]:
    """Lines of a Markdown table."""
    yield "| cell | ranks | gradient | worst parameter | parameters after the steps | STP loss |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        parameter = "" if row.parameter is None else f"{row.parameter:.1e}"
        yield f"| {row.name} | {row.ranks} | {row.gradient:.1e} | {row.worst} | {parameter} | {row.loss:.1e} |"


if __name__ == "__main__":
    for line in render(map(row_of, [cell(name) for name in sys.argv[1:]] or CELLS)):
        print(line, flush=True)
