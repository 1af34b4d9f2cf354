"""The errors that each cell reaches. ``python -m tests.parity.table [NAME ...]`` prints them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.parity._gloo import run_ranks
from tests.parity.cells import CELLS, Cell, cell
from tests.parity.gradients import Outcome, plain_outcomes, schedule_outcome

Errors = dict[str, float]


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
    return dict(zip(plain, run_ranks(plain_outcomes, 1, list(plain.values()), timeout=600)[0], strict=True))


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
            shard = rank.shards[name]
            if shard is None:
                copies.append((name, value))
            else:
                parts[name, rank.replica, shard.dim, shard.size].append((shard.rank, value))
    for (name, _, dim, size), found in parts.items():
        assert sorted(rank for rank, _ in found) == list(range(size)), name
        copies.append((name, torch.cat([value for _, value in sorted(found, key=lambda part: part[0])], dim)))
    return copies


def gradient_errors(ranks: Sequence[Outcome], truth: Outcome) -> Errors:
    """Relative errors of the gradients by parameter."""
    return relative_errors(whole_copies(ranks, "gradients"), truth.gradients)


def run(chosen: Cell) -> list[Outcome]:
    """What each rank of a cell found."""
    return run_ranks(schedule_outcome, chosen.world_size, chosen, layout=chosen.layout)


def row_of(chosen: Cell, ranks: Sequence[Outcome]) -> Row:
    """The errors of a cell that has run."""
    truth = truth_of(chosen)
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


def measure(cells: Iterable[Cell] = CELLS) -> Iterable[Row]:
    """Run cells one after the other; each row comes when its cell is through."""
    for chosen in cells:
        yield row_of(chosen, run(chosen))


def render(rows: Iterable[Row]) -> Iterable[str]:
    """Lines of a Markdown table."""
    yield "| cell | ranks | gradient | worst parameter | parameters after the steps | STP loss |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        parameter = "" if row.parameter is None else f"{row.parameter:.1e}"
        yield f"| {row.name} | {row.ranks} | {row.gradient:.1e} | {row.worst} | {parameter} | {row.loss:.1e} |"


if __name__ == "__main__":
    for line in render(measure([cell(name) for name in sys.argv[1:]] or CELLS)):
        print(line, flush=True)
