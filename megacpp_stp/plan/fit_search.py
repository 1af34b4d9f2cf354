"""The best cut of those that fit the GPU, exactly.

For one limit of a stage's cost: best-first search over partial cuts, by the sum of squared stage costs that they can
still reach, so that the first complete one is the most even. A partial cut is dropped where what is left adds too much
to a load in any way to cut it, and where another one on the same blocks is no worse: at least as even, with every need
that it has met, and nowhere more loaded. A load that cannot become too much any more does not count. The limits are
searched from the cost of the best cut upwards.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add, le

from megacpp_stp.errors import UserError
from megacpp_stp.plan.cuts import rising_limits
from megacpp_stp.plan.fitting import GpuMemory

MOST_STEPS = 10_000
"""Partial cuts that a search goes on from, over all limits; a second or two."""

_LOOKS_A_STEP = 10
"""Stages that are looked ahead at in the time of one step."""

_State = tuple[int, tuple[int, ...]]
"""Needs met, as bits; then the loads, and what each rank has again."""


def best_fitting_stages(
    costs: Sequence[int],
    memory: GpuMemory,
    *,
    at_least: int = 0,
    needs: Sequence[Collection[int]] = (),
) -> tuple[int, ...] | None:
    """The same cut as `megacpp_stp.plan.cuts.best_stages` finds, with the same ties, among those that fit.

    Args:
        costs: One cost a block.
        memory: The blocks on the ranks' GPUs.
        at_least: What the most expensive stage of the best cut costs, whether it fits or not.
        needs: Sets of block indices from 0; every pipeline rank gets at least one block of each set.

    Returns:
        Blocks on each segment; None when no cut fits.

    Raises:
        UserError: The search has grown too long. It never ends in a cut that is not the best.
    """
    sums = list(accumulate(costs, initial=0))
    steps_left = [MOST_STEPS]
    found: dict[int, tuple[int, ...] | None] = {}

    def allows(limit: int) -> bool:
        if limit not in found:
            found[limit] = _Search(sums, limit, memory, needs, steps_left).run()
        return found[limit] is not None

    for limits in rising_limits(sums, at_least):
        if allows(limits[0]):  # the cost of the best cut is often enough
            return found[limits[0]]
        if allows(limits[-1]):
            limit = limits[bisect_left(limits, True, key=allows)]
            return found[limit] if allows(limit) else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ahead:
    """What is known of all ways to cut the blocks that are left: the least squares, and what they add to each load."""

    squares: int
    least: tuple[int, ...]
    most: tuple[int, ...]


class _Search:
    """The most even cut of which no stage costs more than a limit."""

    def __init__(
        self,
        sums: Sequence[int],
        limit: int,
        memory: GpuMemory,
        needs: Sequence[Collection[int]],
        steps_left: list[int],
    ) -> None:
        self._sums, self._limit, self._memory = sums, limit, memory
        self._blocks, self._segments = len(sums) - 1, memory.pipeline * memory.virtual
        self._steps_left = steps_left
        self._most_again = max(memory.again)
        # Bit `need * pipeline + rank` of a state: that rank has such a block.
        self._bits = [
            sum(1 << number * memory.pipeline for number, members in enumerate(needs) if block in members)
            for block in range(self._blocks)
        ]
        self._all_met = (1 << len(needs) * memory.pipeline) - 1
        # What must be met by the end of a segment: all that the ranks need which have no segment left.
        of_rank = sum(1 << number * memory.pipeline for number in range(len(needs)))
        first_last = self._segments - memory.pipeline
        self._due = [
            sum(of_rank << done for done in range(segment - first_last + 1)) for segment in range(self._segments)
        ]
        self._ahead = self._look_ahead()

    def run(self) -> tuple[int, ...] | None:
        """The cut; None when none fits."""
        if 0 not in self._ahead[0]:
            return None
        nothing = (0,) * (len(self._memory.loads) + self._memory.pipeline)
        # Least reachable sum of squares, stages; then what they make: squares, state.
        queue: list[tuple[int, tuple[int, ...], int, _State]] = [(self._ahead[0][0].squares, (), 0, (0, nothing))]
        seen: dict[tuple[int, int], list[_State]] = {}
        while queue:
            _, stages, squares, state = heapq.heappop(queue)
            segment, start = len(stages), sum(stages)
            if segment == self._segments:
                return stages
            beside = seen.setdefault((segment, start), [])
            if any(_beats(other, state) for other in beside):
                continue
            beside.append(state)
            self._take_steps(1)
            for end, after in self._ends(segment, start):
                now = self._after(state, segment, start, end)
                if now is not None:
                    cost = self._sums[end] - self._sums[start]
                    reached = squares + cost * cost
                    heapq.heappush(queue, (reached + after.squares, (*stages, end - start), reached, now))
        return None

    def _take_steps(self, number: int) -> None:
        self._steps_left[0] -= number
        if self._steps_left[0] < 0:
            raise UserError(
                "the best cut that fits the GPU takes too long to find",
                field="parallel.stages",
                value="auto",
                fix="write the number of blocks of each stage; `memory` shows what fits",
            )

    def _ends(self, segment: int, start: int) -> Iterator[tuple[int, _Ahead]]:
        """Where a stage from block `start` may end so that the segments behind it can take the rest."""
        for end in range(start + 1, self._blocks + 1):
            if self._sums[end] - self._sums[start] > self._limit:
                return
            if (after := self._ahead[segment + 1].get(end)) is not None:
                yield end, after

    def _after(self, state: _State, segment: int, start: int, end: int) -> _State | None:
        """The state with one stage more; None where a need is out of reach, or a rank will not fit."""
        memory, rank = self._memory, segment % self._memory.pipeline
        met, spent = state
        for block in range(start, end):
            met |= self._bits[block] << rank
        if met & self._due[segment] != self._due[segment]:
            return None
        loads, again = list(spent[: len(memory.loads)]), list(spent[len(memory.loads) :])
        place = memory.loads_of(rank)
        loads[place] = map(add, loads[place], memory.added(segment, start, end))
        again[rank] = max(again[rank], *memory.again[start:end])
        ahead = self._ahead[segment + 1][end]
        binds = [False] * memory.pipeline
        for index, (load, least, most) in enumerate(zip(memory.loads, ahead.least, ahead.most, strict=True)):
            room = memory.capacity - loads[index]
            if least + (0 if load.is_step else again[load.rank]) > room:
                return None
            if most + (0 if load.is_step else self._most_again) <= room:
                loads[index] = 0  # it never binds: nobody is better for having less of it
            else:
                binds[load.rank] = True
        return met, (*loads, *(amount if bind else 0 for amount, bind in zip(again, binds, strict=True)))

    def _look_ahead(self) -> list[dict[int, _Ahead]]:
        """By segment and first block left; places from which no cut goes on are missing."""
        nothing = (0,) * len(self._memory.loads)
        ahead: list[dict[int, _Ahead]] = [{} for _ in range(self._segments)]
        ahead.append({self._blocks: _Ahead(squares=0, least=nothing, most=nothing)})
        for segment in reversed(range(self._segments)):
            for start in range(segment, self._blocks):
                found = self._from(segment, start, ahead[segment + 1])
                if found is not None:
                    ahead[segment][start] = found
        return ahead

    def _from(self, segment: int, start: int, behind: dict[int, _Ahead]) -> _Ahead | None:
        memory, place = self._memory, self._memory.loads_of(segment % self._memory.pipeline)
        squares, least, most = [], [], []
        last = bisect_right(self._sums, self._sums[start] + self._limit) - 1
        for end in range(max(start + 1, min(behind, default=self._blocks)), last + 1):
            if (after := behind.get(end)) is None:
                continue
            cost = self._sums[end] - self._sums[start]
            added = memory.added(segment, start, end)
            low, high = list(after.least), list(after.most)
            low[place] = map(add, low[place], added)
            high[place] = map(add, high[place], added)
            squares.append(after.squares + cost * cost)
            least.append(low)
            most.append(high)
        self._take_steps(len(squares) // _LOOKS_A_STEP)
        if not squares:
            return None
        return _Ahead(squares=min(squares), least=tuple(map(min, *least, low)), most=tuple(map(max, *most, high)))


def _beats(one: _State, other: _State) -> bool:
    return one[0] | other[0] == one[0] and all(map(le, one[1], other[1]))
