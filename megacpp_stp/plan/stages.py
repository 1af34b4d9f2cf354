"""How many blocks each pipeline segment gets: what the recipe says, or the best cut that fits the GPU.

The cost model is imported only where a cut is searched or judged: most plans need none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import HybridPlan, lower
from megacpp_stp.recipe.schema import Recipe

if TYPE_CHECKING:
    from megacpp_stp.plan.fitting import GpuMemory
    from megacpp_stp.plan.parameters import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class CutReport:
    """How even a cut is, and against which others. Imbalance is the largest over the mean stage's cost.

    Attributes:
        stages: Blocks on each segment.
        imbalance: Of this cut.
        equal_stages: Equal numbers of blocks; None where a rank would then lack a block that it needs.
        equal_imbalance: Of equal numbers, whether they would run or not.
        best_stages: What ``auto`` chooses; None where it would take too long to find.
        best_imbalance: Of that.
    """

    stages: tuple[int, ...]
    imbalance: float
    equal_stages: tuple[int, ...] | None
    equal_imbalance: float
    best_stages: tuple[int, ...] | None
    best_imbalance: float | None


def choose_stages(recipe: Recipe) -> tuple[int, ...]:
    """Blocks on each segment. An explicit cut in the recipe wins.

    Raises:
        UserError: No cut gives each pipeline rank what it needs, or the search for one that fits is too long.
    """
    if recipe.parallel.stages != "auto":
        return recipe.parallel.stages
    return best_cut(recipe)


def best_cut(recipe: Recipe) -> tuple[int, ...]:
    """The cut whose most expensive stage costs the fewest training FLOPs a token, of all that fit an H200.

    Of all cuts when none fits: the estimate may be too high, and `megacpp_stp.plan.memory` says so. Ties as in
    `megacpp_stp.plan.cuts.best_stages`. What the recipe says about stages is not looked at.

    Raises:
        UserError: No cut gives each pipeline rank what it needs, or the search for one that fits is too long.
    """
    from megacpp_stp.plan.cuts import best_stages, stage_costs
    from megacpp_stp.plan.flops import costs_of_blocks

    segments, pipeline = recipe.parallel.pipeline * recipe.parallel.virtual, recipe.parallel.pipeline
    chosen = _parts(recipe)
    costs, needs = costs_of_blocks(recipe, chosen), _needs(recipe, chosen)
    best = best_stages(costs, segments=segments, pipeline=pipeline, needs=needs)
    memory = _memory(recipe, chosen)
    if memory.holds(best) or memory.is_hopeless:
        return best
    from megacpp_stp.plan.fit_search import best_fitting_stages

    return best_fitting_stages(costs, memory, at_least=max(stage_costs(costs, best)), needs=needs) or best


def best_cut_or_none(recipe: Recipe) -> tuple[int, ...] | None:
    """`best_cut`, to compare another cut with; None where it would take too long to find."""
    try:
        return best_cut(recipe)
    except UserError:
        return None


def cut_report(recipe: Recipe, layout: HybridPlan) -> CutReport:
    """How even the cut of a layout is.

    Args:
        recipe: The recipe.
        layout: Its lowering.
    """
    from megacpp_stp.plan.cuts import equal_stages, imbalance
    from megacpp_stp.plan.flops import costs_of_blocks

    chosen = _parts(recipe)
    costs = costs_of_blocks(recipe, chosen)
    equal = equal_stages(len(costs), segments=len(layout.stages))
    best = layout.stages if recipe.parallel.stages == "auto" else best_cut_or_none(recipe)
    return CutReport(
        stages=layout.stages,
        imbalance=imbalance(costs, layout.stages),
        equal_stages=equal if _meets(equal, _needs(recipe, chosen), pipeline=layout.pipeline) else None,
        equal_imbalance=imbalance(costs, equal),
        best_stages=best,
        best_imbalance=None if best is None else imbalance(costs, best),
    )


def _parts(recipe: Recipe) -> tuple[Part, ...]:
    """All parts; what they hold is the same for every cut of as many stages."""
    from megacpp_stp.plan.cuts import refuse_too_many
    from megacpp_stp.plan.parameters import parts

    segments, depth = recipe.parallel.pipeline * recipe.parallel.virtual, recipe.model.depth
    refuse_too_many(segments, blocks=depth)
    return parts(recipe, lower(recipe, stages=(depth - segments + 1, *[1] * (segments - 1))))


def _needs(recipe: Recipe, chosen: tuple[Part, ...]) -> list[set[int]]:
    """Sets of block indices, counted from 0, of which each pipeline rank must have one."""
    from megacpp_stp.plan.checks import rank_needs

    return [
        {part.block - 1 for part in chosen if part.kind == kind and part.block is not None}
        for kind, _, _ in rank_needs(recipe)
    ]


def _meets(stages: tuple[int, ...], needs: list[set[int]], *, pipeline: int) -> bool:
    ranks = [segment % pipeline for segment, blocks in enumerate(stages) for _ in range(blocks)]
    return all(len({ranks[block] for block in blocks}) == pipeline for blocks in needs)


def _memory(recipe: Recipe, chosen: tuple[Part, ...]) -> GpuMemory:
    """What the blocks take of each rank's GPU."""
    from megacpp_stp.plan.checks import micro_batches
    from megacpp_stp.plan.fitting import GpuMemory
    from megacpp_stp.plan.footprint import Footprint, footprints
    from megacpp_stp.plan.memory import H200_BYTES
    from megacpp_stp.plan.schedule import held_at_once

    parallel, depth = recipe.parallel, recipe.model.depth
    blocks: list[list[Footprint]] = [[] for _ in range(depth)]
    for part, found in zip(chosen, footprints(recipe, chosen), strict=True):
        blocks[part.home(depth) - 1].append(found)
    moments = [
        held_at_once(
            rank=rank,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            micro_batches=micro_batches(recipe),
        )
        for rank in range(parallel.pipeline)
    ]
    return GpuMemory(blocks, moments=moments, capacity=H200_BYTES)
