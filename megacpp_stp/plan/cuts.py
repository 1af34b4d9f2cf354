"""Where to cut a row of blocks into pipeline stages: exactly the best cut, and how good any other one is.

Costs are whole numbers (FLOPs, bytes), so that sums are exact and equal recipes give equal cuts on any machine.
A stage is one pipeline segment; segment i lies on pipeline rank ``i % pipeline``, as in Megatron.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

from megacpp_stp.errors import UserError

_FIELD = "parallel.stages"
# A partial cut: sum of squared stage costs, then the stages themselves. Smaller is better.
_Partial = tuple[int, tuple[int, ...]]
_ANY: _Partial = (0, ())


def best_stages(
    costs: Sequence[int], *, segments: int, pipeline: int, needs: Sequence[Collection[int]] = ()
) -> tuple[int, ...]:
    """The contiguous cut whose most expensive stage is cheapest.

    Of all such cuts, the one with the smallest sum of squared stage costs; of those, the lexicographically smallest,
    which puts fewer blocks on the early stages, where 1F1B keeps more microbatches in flight.

    Parametric search over the possible stage costs; for each, dynamic programming over (segment, first block left,
    needs met so far). The last is what can grow, with 2^(pipeline ranks x needs) at worst; only states that no other
    one beats are kept. Hundredths of a second for 120 blocks on 8 ranks of 4 virtual stages.

    Args:
        costs: One cost a block, not negative. Add the embedding's to the first and the output head's to the last:
            every segment has a block, so they stay there.
        segments: Number of stages: pipeline x virtual.
        pipeline: Pipeline ranks.
        needs: Sets of block indices from 0; every pipeline rank gets at least one block of each set. An example is
            the expert blocks, see `megacpp_stp.plan.checks`.

    Returns:
        Blocks on each segment, in order; all at least 1.

    Raises:
        UserError: No cut is allowed.
    """
    if segments < 1 or pipeline < 1 or segments % pipeline:
        raise ValueError(f"{segments} segments do not go round {pipeline} pipeline ranks")
    if any(cost < 0 for cost in costs):
        raise ValueError("costs must not be negative")
    refuse_too_many(segments, blocks=len(costs))
    search = _Search(costs, segments=segments, pipeline=pipeline, needs=needs)
    found = search.smallest_limit()
    if found is None:
        raise UserError(
            f"no cut into {segments} stages gives each of the {pipeline} pipeline ranks every kind of block it needs",
            field=_FIELD,
            fix="use fewer pipeline or virtual stages, or a pattern with more such blocks",
        )
    return found


def refuse_too_many(segments: int, *, blocks: int) -> None:
    """Each stage has a block.

    Raises:
        UserError: There are fewer blocks than stages.
    """
    if blocks < segments:
        raise UserError(
            f"{blocks} blocks do not fill {segments} stages",
            field=_FIELD,
            fix="use fewer pipeline or virtual stages",
        )


def rising_limits(sums: Sequence[int], least: int) -> Iterator[list[int]]:
    """All that a stage can cost, from `least` upwards, in ever larger batches, each in order; no batch is empty.

    The answer of a search is near the low end, and of a deep model all of them would be too many to write down.

    Args:
        sums: Costs of the first 0, 1, 2, ... blocks.
        least: The smallest cost wanted.
    """
    low, width = least, max((b - a for a, b in zip(sums, sums[1:], strict=False)), default=0)
    while low <= sums[-1]:
        high = min(low + width, sums[-1])
        found: set[int] = set()
        for place, start in enumerate(sums):
            first = bisect_left(sums, start + low, place + 1)
            found.update(end - start for end in sums[first : bisect_right(sums, start + high, first)])
        if found:
            yield sorted(found)
        low, width = high + 1, 4 * width + 1


def stage_costs(costs: Sequence[int], stages: Sequence[int]) -> tuple[int, ...]:
    """The cost of each stage of a cut.

    Args:
        costs: One cost a block.
        stages: Blocks on each stage; they add up to the number of costs.
    """
    if sum(stages) != len(costs):
        raise ValueError(f"{len(costs)} blocks, but the stages {list(stages)} have {sum(stages)}")
    ends = list(accumulate(stages, initial=0))
    return tuple(sum(costs[start:end]) for start, end in zip(ends, ends[1:], strict=False))


def imbalance(costs: Sequence[int], stages: Sequence[int]) -> float:
    """Largest over mean stage cost: 1 is perfect; 1.1 leaves the mean stage idle for a tenth of its own time."""
    of_stages = stage_costs(costs, stages)
    total = sum(of_stages)
    return max(of_stages) * len(of_stages) / total if total else 1.0


def equal_stages(blocks: int, *, segments: int) -> tuple[int, ...]:
    """Equal numbers of blocks, for comparison; what does not divide goes to the first stages, one each."""
    if blocks < segments or segments < 1:
        raise ValueError(f"{blocks} blocks do not fill {segments} stages")
    each, left = divmod(blocks, segments)
    return tuple(each + (segment < left) for segment in range(segments))


class _Search:
    """One search; holds the prefix sums and what each block meets."""

    def __init__(self, costs: Sequence[int], *, segments: int, pipeline: int, needs: Sequence[Collection[int]]) -> None:
        self._blocks = len(costs)
        self._segments = segments
        self._pipeline = pipeline
        self._sums = list(accumulate(costs, initial=0))
        # Bit `need * pipeline + rank` of a state: that rank has such a block.
        self._bits_of_block = [
            sum(1 << need * pipeline for need, members in enumerate(needs) if block in members)
            for block in range(self._blocks)
        ]
        self._bits_of_rank = sum(1 << need * pipeline for need in range(len(needs)))
        self._all_met = (1 << len(needs) * pipeline) - 1

    def smallest_limit(self) -> tuple[int, ...] | None:
        """The best cut under the smallest limit that allows one; None when no limit does."""
        sums = self._sums
        floor = -(-sums[-1] // self._segments)
        for limits in rising_limits(sums, floor):

            def allows(limit: int) -> bool:
                return self._cut(limit, most_even=False) is not None

            if allows(limits[-1]):
                return self._cut(limits[bisect_left(limits, True, key=allows)], most_even=True)
        return None

    def _cut(self, limit: int, *, most_even: bool) -> tuple[int, ...] | None:
        """The most even cut with no stage above `limit`, or any such cut, which is found sooner."""
        frontier: dict[int, dict[int, _Partial]] = {0: {0: (0, ())}}  # first block left -> needs met -> best
        for segment in range(self._segments):
            following: dict[int, dict[int, _Partial]] = {}
            for start, states in frontier.items():
                self._extend(segment, start, states, limit, most_even, following)
            frontier = {end: _without_dominated(states) for end, states in following.items()}
        best = frontier.get(self._blocks, {}).get(self._all_met)
        return best[1] if best else None

    def _extend(
        self,
        segment: int,
        start: int,
        states: dict[int, _Partial],
        limit: int,
        most_even: bool,
        following: dict[int, dict[int, _Partial]],
    ) -> None:
        """Add every allowed stage that begins at block `start`."""
        left = self._segments - segment - 1
        rank = segment % self._pipeline
        # What must be met by now: all that the ranks need which have no segment left.
        due = sum(self._bits_of_rank << done for done in range(rank + 1)) if left < self._pipeline else 0
        here = 0
        for end in range(start + 1, self._blocks - left + 1):
            cost = self._sums[end] - self._sums[start]
            if cost > limit:
                break
            here |= self._bits_of_block[end - 1] << rank
            if self._sums[-1] - self._sums[end] > left * limit:  # the segments left cannot take the rest
                continue
            into = following.setdefault(end, {})
            for met, (squares, stages) in states.items():
                now = met | here
                if now & due != due:
                    continue
                partial = (squares + cost * cost, (*stages, end - start)) if most_even else _ANY
                if now not in into or partial < into[now]:
                    into[now] = partial


def _without_dominated(states: dict[int, _Partial]) -> dict[int, _Partial]:
    """Drop each state that another one beats: no worse a cut, and every need that it has met."""
    kept: dict[int, _Partial] = {}
    for met, partial in sorted(states.items(), key=lambda item: item[1]):
        if not any(met | other == other for other in kept):
            kept[met] = partial
    return kept
