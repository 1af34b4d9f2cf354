"""How many microbatches a pipeline rank holds at once under Megatron's schedules.

Follows ``get_pp_rank_microbatches`` and ``get_schedule_table`` of megatron/core/pipeline_parallel/schedules.py, 0.19.2,
with the default group of `pipeline` microbatches a virtual stage.
"""

from __future__ import annotations

from collections.abc import Sequence


def peak_in_flight(
    costs: Sequence[int], *, rank: int, pipeline: int, micro_batches: int
) -> tuple[int, tuple[int, ...]]:
    """The most that forward passes without their backward pass hold at one time.

    Args:
        costs: What one microbatch holds on each virtual stage of the rank, in order.
        rank: Pipeline rank.
        pipeline: Pipeline ranks.
        micro_batches: Microbatches an iteration.

    Returns:
        The largest sum, and how many microbatches of each virtual stage it is made of.
    """
    virtual = len(costs)
    steps = micro_batches * virtual
    warmup = min(_warmup(rank=rank, pipeline=pipeline, virtual=virtual), steps)
    order = _virtual_stages(pipeline=pipeline, virtual=virtual, micro_batches=micro_batches)
    held = [0] * virtual
    best, at_best = 0, (0,) * virtual
    for step in range(steps):
        held[order[step]] += 1
        now = sum(number * cost for number, cost in zip(held, costs, strict=True))
        if now > best:
            best, at_best = now, tuple(held)
        if step >= warmup:  # one backward pass for each forward pass, last virtual stage first
            held[virtual - 1 - order[step - warmup]] -= 1
    return best, at_best


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
