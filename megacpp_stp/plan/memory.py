"""Memory of one GPU of each pipeline rank, row by row; each row says whether it is exact or estimated.

Exact means: the bytes of the tensors that megatron-core 0.19.2 allocates, to the element. Not modelled, and therefore
what the distance to the capacity is for: the CUDA context, NCCL's buffers, temporary buffers of either pass but those
of sparse attention, and what the allocator loses between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megacpp_stp.plan.checks import micro_batches
from megacpp_stp.plan.footprint import Footprint, footprints
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.plan.parameters import Part, of_rank
from megacpp_stp.plan.schedule import Held, amount, peak_in_flight
from megacpp_stp.recipe.schema import Recipe

GIB = 2**30
H200_BYTES = 141 * 10**9
"""As the data sheet has it: 141 GB = 131.3 GiB. Drivers report somewhat more, which is not counted on."""

Phase = Literal["always", "passes", "step"]
_LOGITS = {
    False: "fp32 softmax of each output head, and the main one's logits beside it",
    True: "of each output head, two numbers a token, and the fp32 gradient of its hidden states in backward",
}
"""By whether the loss is fused with the output layer."""
_PHASES: tuple[Phase, ...] = ("always", "passes", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of memory on one GPU.

    Attributes:
        name: What it is.
        bytes: How much.
        exact: To the element; else an estimate.
        phase: When it is there: always, only during forward and backward passes, or only during the optimizer step.
        note: How it was found, in a few words.
    """

    name: str
    bytes: int
    exact: bool
    phase: Phase
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """One GPU of one pipeline rank.

    Attributes:
        rank: Pipeline rank.
        elements: Parameters that this GPU holds, copies included.
        in_flight: Microbatches of each virtual stage at the peak.
        rows: What is held.
    """

    rank: int
    elements: int
    in_flight: Held
    rows: tuple[Row, ...]

    @property
    def peak_bytes(self) -> int:
        """What is always there, and the larger of passes and optimizer step, which do not overlap."""
        of_phase = {phase: sum(row.bytes for row in self.rows if row.phase == phase) for phase in _PHASES}
        return of_phase["always"] + max(of_phase["passes"], of_phase["step"])

    @property
    def largest(self) -> Row:
        """The row to look at first where the rank does not fit."""
        return max(self.rows, key=lambda row: row.bytes)


def rank_memories(recipe: Recipe, layout: HybridPlan, chosen: tuple[Part, ...]) -> tuple[RankMemory, ...]:
    """Memory of one GPU of each pipeline rank.

    Args:
        recipe: The recipe.
        layout: Its lowering.
        chosen: Its parts, from `megacpp_stp.plan.parameters.parts`.
    """
    return tuple(_rank_memory(recipe, layout, chosen, rank=rank) for rank in range(layout.pipeline))


def _rank_memory(recipe: Recipe, layout: HybridPlan, chosen: tuple[Part, ...], *, rank: int) -> RankMemory:
    mine = of_rank(chosen, rank=rank, pipeline=layout.pipeline)
    found = footprints(recipe, mine)
    stages = [
        [one for one, part in zip(found, mine, strict=True) if part.segment // layout.pipeline == virtual]
        for virtual in range(layout.virtual)
    ]
    _, in_flight = peak_in_flight(
        [sum(one.microbatch for one in stage) for stage in stages],
        rank=rank,
        pipeline=layout.pipeline,
        micro_batches=micro_batches(recipe),
    )
    return RankMemory(
        rank=rank,
        elements=sum(one.elements for one in found),
        in_flight=in_flight,
        rows=(*_persistent(recipe, found), *_working(recipe, stages, in_flight)),
    )


def _persistent(recipe: Recipe, found: Sequence[Footprint]) -> Iterator[Row]:
    """Weights, gradients, Adam; see `Footprint`."""
    sharded, precision = recipe.optimizer.distributed, recipe.training.precision
    padding = "; without the buckets' padding" if sharded else ""
    moments = "two fp32 moments" if precision == "fp32" else "two fp32 moments and an fp32 copy of the weights"
    rows: tuple[tuple[str, int, str], ...] = (
        ("weights", sum(one.weights for one in found), precision + padding),
        ("gradients", sum(one.gradients for one in found), "fp32" + padding),
        (
            "optimizer state",
            sum(one.state for one in found),
            moments + (", over data-parallel ranks" if sharded else ""),
        ),
    )
    for name, size, note in rows:
        yield Row(name=name, bytes=size, exact=not sharded, phase="always", note=note)
    yield Row(
        name="optimizer step",
        bytes=sum(one.step for one in found),
        exact=False,
        phase="step",
        note="torch's AdamW takes the root of all second moments at once; a fused Adam does not",
    )


def _working(recipe: Recipe, stages: Sequence[Sequence[Footprint]], in_flight: Held) -> Iterator[Row]:
    """What forward passes keep for their backward passes at the schedule's peak; rows of nothing are left out."""
    recompute = recipe.training.recompute
    how = "no" if recompute is None else recompute.granularity
    largest = max((one for stage in stages for one in stage), key=lambda one: one.again)
    rows: tuple[tuple[str, Callable[[Footprint], int], int, str], ...] = (
        ("activations", lambda one: one.activations, 0, f"kept by autograd, fused attention, {how} recomputation"),
        ("expert dispatch", lambda one: one.dispatch, 0, "routed copies of the tokens; balanced routing"),
        (
            "DSA scores",
            lambda one: one.scores,
            largest.scores_again,
            "heads x keys of each token, as the plain path keeps them; of one layer where they are computed again",
        ),
        (
            "DSA pass",
            lambda one: 0,
            largest.attention_pass,
            "temporaries of one layer's attention in backward, beside its scores; the indexer's loss never meets it",
        ),
        (
            "indexer loss",
            lambda one: 0,
            largest.indexer_loss,
            "what the indexer and its loss need above the attention of one layer, before it or behind it",
        ),
        (
            "recomputed",
            lambda one: 0,
            largest.again - largest.scores_again - largest.attention_pass - largest.indexer_loss,
            "all else that recomputation brings back of the largest layer, in its backward pass",
        ),
        ("logits", lambda one: one.logits, 0, _LOGITS[recipe.training.fused_cross_entropy is not None]),
    )
    for name, size, more, note in rows:
        held = amount(in_flight, [sum(size(one) for one in stage) for stage in stages]) + more
        if held:
            yield Row(name=name, bytes=held, exact=False, phase="passes", note=note)
