"""How many microbatches a pipeline rank holds at once under Megatron's schedules.

Follows ``get_pp_rank_microbatches`` and ``get_schedule_table`` of megatron/core/pipeline_parallel/schedules.py, 0.19.2,
with the default group of `pipeline` microbatches a virtual stage.
"""

from __future__ import annotations

from collections.abc import Sequence

Held = tuple[int, ...]
"""Microbatches of each virtual stage of a rank."""

_ENOUGH_GROUPS = 4
"""Groups of `pipeline` microbatches behind which a schedule repeats: warm-up takes less than two, a period is one."""


def peak_in_flight(costs: Sequence[int], *, rank: int, pipeline: int, micro_batches: int) -> tuple[int, Held]:
    """The most that forward passes without their backward pass hold at one time.

    Args:
        costs: What one microbatch holds on each virtual stage of the rank, in order.
        rank: Pipeline rank.
        pipeline: Pipeline ranks.
        micro_batches: Microbatches an iteration.

    Returns:
        The largest sum, and how many microbatches of each virtual stage it is made of.
    """
    moments = held_at_once(rank=rank, pipeline=pipeline, virtual=len(costs), micro_batches=micro_batches)
    best = max(moments, key=lambda held: amount(held, costs))
    return amount(best, costs), best


def amount(held: Held, costs: Sequence[int]) -> int:
    """What some microbatches of each virtual stage hold together."""
    return sum(number * cost for number, cost in zip(held, costs, strict=True))


def held_at_once(*, rank: int, pipeline: int, virtual: int, micro_batches: int) -> tuple[Held, ...]:
    """The moments of an iteration of which one is the peak, whatever the virtual stages cost.

    Each is how many microbatches of each virtual stage are held; none has at least as many of each as another.
    Arguments as in `peak_in_flight`, with the number of virtual stages a rank.
    """
    micro_batches = min(micro_batches, _ENOUGH_GROUPS * pipeline)
    steps = micro_batches * virtual
    warmup = min(_warmup(rank=rank, pipeline=pipeline, virtual=virtual), steps)
    order = _virtual_stages(pipeline=pipeline, virtual=virtual, micro_batches=micro_batches)
    held = [0] * virtual
    moments: dict[Held, None] = {}
    for step in range(steps):
        held[order[step]] += 1
        moments[tuple(held)] = None
        if step >= warmup:  # one backward pass for each forward pass, last virtual stage first
            held[virtual - 1 - order[step - warmup]] -= 1
    return tuple(one for one in moments if not any(other != one and _at_least(other, one) for other in moments))


def _at_least(one: Held, other: Held) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def _warmup(*, rank: int, pipeline: int, virtual: int) -> int:
    """Forward passes before the first backward pass, less one."""
    if virtual == 1:
        return pipeline - rank - 1
    return 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline


def _virtual_stages(*, pipeline: int, virtual: int, micro_batches: int) -> list[int]:
    """The virtual stage of each forward pass: groups of `pipeline` microbatches go through all stages in turn."""
    return [
        stage
        for first in range(0, micro_batches, pipeline)
        for stage in range(virtual)
        for _ in range(min(pipeline, micro_batches - first))
    ]
