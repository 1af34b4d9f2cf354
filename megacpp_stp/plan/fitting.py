"""The memory of each pipeline rank as sums over its blocks, and whether a cut fits.

A rank's memory is at its largest at one of a few moments of the schedule (`megacpp_stp.plan.schedule`), each of which
holds so many microbatches of each virtual stage, or at the optimizer's step. Each of these is a *load*: a sum over the
rank's blocks. The rank fits if none of its loads is above the capacity, with the largest layer that recomputation
brings back on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import add

from megacpp_stp.plan.footprint import Footprint
from megacpp_stp.plan.schedule import Held


@dataclass(frozen=True, slots=True)
class Load:
    """One sum of one rank: what is always there, and held microbatches or what the optimizer's step takes."""

    rank: int
    held: Held
    is_step: bool


class GpuMemory:
    """What the blocks of a model take of each pipeline rank's GPU.

    Args:
        blocks: What lies on each block's segment: its layers, and on the first and last what goes with them.
        moments: For each pipeline rank the moments of its schedule.
        capacity: Bytes of a GPU.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Footprint]],
        *,
        moments: Sequence[Sequence[Held]],
        capacity: int,
    ) -> None:
        self.capacity = capacity
        self.pipeline, self.virtual = len(moments), len(moments[0][0])
        self._always = _sums([sum(one.always for one in block) for block in blocks])
        self._step = _sums([sum(one.step for one in block) for block in blocks])
        self._microbatch = _sums([sum(one.microbatch for one in block) for block in blocks])
        self.again = [max((one.again for one in block), default=0) for block in blocks]
        idle = (0,) * self.virtual
        self.loads = [
            load
            for rank, of_rank in enumerate(moments)
            for load in (Load(rank, idle, True), *(Load(rank, held, False) for held in of_rank))
        ]
        sizes = [1 + len(of_rank) for of_rank in moments]
        self._first = list(accumulate(sizes, initial=0))

    def added(self, segment: int, start: int, end: int) -> list[int]:
        """What blocks `start` to `end` on a segment add to each load of its rank."""
        virtual, rank = divmod(segment, self.pipeline)
        always = self._always[end] - self._always[start]
        microbatch = self._microbatch[end] - self._microbatch[start]
        step = self._step[end] - self._step[start]
        return [
            always + (step if load.is_step else load.held[virtual] * microbatch)
            for load in self.loads[self.loads_of(rank)]
        ]

    def loads_of(self, rank: int) -> slice:
        """Where a rank's loads are among all."""
        return slice(self._first[rank], self._first[rank + 1])

    @property
    def is_hopeless(self) -> bool:
        """Whether what is always there is more than all ranks have, so that no cut fits."""
        return self._always[-1] > self.pipeline * self.capacity

    def holds(self, stages: Sequence[int]) -> bool:
        """Whether each rank of a cut fits."""
        loads, again = [0] * len(self.loads), [0] * self.pipeline
        ends = list(accumulate(stages))
        for segment, (start, end) in enumerate(zip(chain([0], ends), ends, strict=False)):
            rank = segment % self.pipeline
            place = self.loads_of(rank)
            loads[place] = map(add, loads[place], self.added(segment, start, end))
            again[rank] = max(again[rank], *self.again[start:end])
        return all(
            amount + (0 if load.is_step else again[load.rank]) <= self.capacity
            for load, amount in zip(self.loads, loads, strict=True)
        )


def _sums(amounts: Sequence[int]) -> list[int]:
    return list(accumulate(amounts, initial=0))
