"""What this version can plan and not run yet. A plan shows its gaps, and a launch with any is refused.

A recipe stays complete and checkable while a part of the product is missing: nothing is left out of its arguments,
nothing else runs in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_stp.plan.lowering import HybridPlan, Kind
from megacpp_stp.recipe.schema import Recipe

# Kinds whose state passes from each position to the next: a rank's part of a sequence needs the one before it.
_RECURRENT: dict[Kind, str] = {"mamba3": "Mamba-3", "m2rnn": "M2RNN"}


@dataclass(frozen=True, slots=True)
class Gap:
    """One thing that stands between a plan and its launch.

    Attributes:
        field: The recipe field that asks for it.
        what: What is missing, in a sentence.
    """

    field: str
    what: str


def find_gaps(recipe: Recipe, layout: HybridPlan) -> tuple[Gap, ...]:
    """All gaps of a plan, in the order of the recipe."""
    return (*_recurrent_gaps(recipe, layout), *_parallel_gaps(recipe, layout))


def _recurrent_gaps(recipe: Recipe, layout: HybridPlan) -> Iterator[Gap]:
    if recipe.parallel.context == 1:
        return
    for kind, name in _RECURRENT.items():
        if numbers := layout.numbers(kind):
            yield Gap("parallel.context", f"{name} at layers {_short(numbers)} has no context parallelism yet")


def _parallel_gaps(recipe: Recipe, layout: HybridPlan) -> Iterator[Gap]:
    parallel, recompute = recipe.parallel, recipe.training.recompute
    if parallel.context > 1 and recipe.model.backend == "torch" and recipe.model.families.A:
        yield Gap("parallel.context", "attention of backend torch has no context parallelism yet")
    if parallel.tensor > 1 and not parallel.sequence_parallel and (layout.numbers("dsa") or layout.mtp_depths):
        yield Gap(
            "parallel.sequence_parallel",
            "sparse attention and multi-token prediction under tensor parallelism are proven with it only",
        )
    if parallel.tensor > 1 and recompute and recompute.granularity == "full":
        yield Gap("training.recompute", "full recomputation under tensor parallelism is not proven yet")


def _short(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
