"""Memory of one GPU of each pipeline rank, row by row; each row says whether it is exact or estimated.

Exact means: the bytes of the tensors that megatron-core 0.19.2 allocates, to the element. Not modelled, and therefore
what the distance to the capacity is for: the CUDA context, NCCL's buffers, temporary buffers of either pass, and what
the allocator loses between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megacpp_stp.plan.activations import COMPUTE_BYTES, FP32, Kept, kept_by
from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.parameters import Part, Weight, of_rank
from megacpp_stp.plan.schedule import peak_in_flight
from megacpp_stp.recipe.schema import Recipe

GIB = 2**30
H200_BYTES = 141 * 10**9
"""As the data sheet has it: 141 GB = 131.3 GiB. Drivers report somewhat more, which is not counted on."""

_ADAM_MOMENTS = 2

Phase = Literal["always", "passes", "step"]


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
    in_flight: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def peak_bytes(self) -> int:
        """What is always there, and the larger of passes and optimizer step, which do not overlap."""
        of_phase = {phase: sum(row.bytes for row in self.rows if row.phase == phase) for phase in _PHASES}
        return of_phase["always"] + max(of_phase["passes"], of_phase["step"])


_PHASES: tuple[Phase, ...] = ("always", "passes", "step")


def rank_memory(plan: RunPlan, chosen: tuple[Part, ...], *, rank: int) -> RankMemory:
    """Memory of one GPU.

    Args:
        plan: The plan.
        chosen: Its parts, from `megacpp_stp.plan.parameters.parts`.
        rank: Pipeline rank.
    """
    recipe, pipeline = plan.recipe, plan.layout.pipeline
    mine = of_rank(chosen, rank=rank, pipeline=pipeline)
    weights = tuple(weight for part in mine for weight in (*part.weights, *part.copies))
    in_flight, working = _working(plan, mine, rank=rank)
    return RankMemory(
        rank=rank,
        elements=sum(_on_gpu(recipe, weight) for weight in weights),
        in_flight=in_flight,
        rows=(*_persistent(plan, weights), *working),
    )


def _on_gpu(recipe: Recipe, weight: Weight) -> int:
    return weight.on_gpu(tensor=recipe.parallel.tensor, expert=recipe.parallel.expert)


def _persistent(plan: RunPlan, weights: tuple[Weight, ...]) -> tuple[Row, ...]:
    """Weights, gradients, Adam.

    Gradients are fp32 in either precision (``validate_args`` turns accumulate_allreduce_grads_in_fp32 on for bf16), in
    DDP's buffers. Adam keeps two fp32 moments and, for bf16, an fp32 copy of the weights; the distributed optimizer
    cuts these, but neither weights nor gradients, over data-parallel ranks.
    """
    recipe = plan.recipe
    sharded, fp32 = recipe.optimizer.distributed, recipe.training.precision == "fp32"
    elements = sum(_on_gpu(recipe, weight) for weight in weights)
    stepped = _stepped_elements(plan, weights)
    state = FP32 * (_ADAM_MOMENTS if fp32 else _ADAM_MOMENTS + 1)
    padding = "; without the buckets' padding" if sharded else ""
    moments = "two fp32 moments" if fp32 else "two fp32 moments and an fp32 copy of the weights"
    return (
        Row(
            name="weights",
            bytes=COMPUTE_BYTES[recipe.training.precision] * elements,
            exact=not sharded,
            phase="always",
            note=recipe.training.precision + padding,
        ),
        Row(name="gradients", bytes=FP32 * elements, exact=not sharded, phase="always", note="fp32" + padding),
        Row(
            name="optimizer state",
            bytes=state * stepped,
            exact=not sharded,
            phase="always",
            note=moments + (", over data-parallel ranks" if sharded else ""),
        ),
        Row(
            name="optimizer step",
            bytes=FP32 * stepped,
            exact=False,
            phase="step",
            note="torch's AdamW takes the root of all second moments at once; a fused Adam does not",
        ),
    )


def _stepped_elements(plan: RunPlan, weights: tuple[Weight, ...]) -> int:
    """Elements whose optimizer state one GPU has."""
    recipe, parallel = plan.recipe, plan.recipe.parallel
    if not recipe.optimizer.distributed:
        return sum(_on_gpu(recipe, weight) for weight in weights)
    # Megatron shards over data x context, and experts over what their own groups leave of the world.
    dense = plan.data_parallel * parallel.context
    of_experts = plan.world_size // (parallel.pipeline * parallel.tensor * parallel.expert)
    shards = {"none": dense, "tensor": dense, "expert": of_experts}
    return sum(-(-_on_gpu(recipe, weight) // shards[weight.split]) for weight in weights)


def _working(plan: RunPlan, mine: tuple[Part, ...], *, rank: int) -> tuple[tuple[int, ...], tuple[Row, ...]]:
    """What forward passes keep for their backward passes, at the schedule's peak."""
    recipe, layout = plan.recipe, plan.layout
    training = recipe.training
    tokens = training.sequence_length * training.micro_batch_size // recipe.parallel.context
    stages = [
        [kept_by(recipe, part) for part in mine if part.segment // layout.pipeline == virtual]
        for virtual in range(layout.virtual)
    ]
    _, in_flight = peak_in_flight(
        [sum(kept.total for kept in stage) for stage in stages],
        rank=rank,
        pipeline=layout.pipeline,
        micro_batches=plan.micro_batches,
    )

    def held(field: Literal["layer", "dispatch", "logits"]) -> int:
        each = (sum(_field(kept, field) for kept in stage) for stage in stages)
        return tokens * sum(number * one for number, one in zip(in_flight, each, strict=True))

    uncut = "; upper bound: not divided by tensor parallelism" if recipe.parallel.tensor > 1 else ""
    row_notes: tuple[tuple[str, Literal["layer", "dispatch", "logits"], str], ...] = (
        ("activations", "layer", f"kept by autograd, fused attention, no recomputation{uncut}"),
        ("expert dispatch", "dispatch", f"routed copies of the tokens; balanced routing{uncut}"),
        ("logits", "logits", f"fp32 softmax and the logits beside it{uncut}"),
    )
    rows = (
        Row(name=name, bytes=held(field), exact=False, phase="passes", note=note) for name, field, note in row_notes
    )
    return in_flight, tuple(row for row in rows if row.bytes)


def _field(kept: Kept, field: Literal["layer", "dispatch", "logits"]) -> int:
    return {"layer": kept.layer, "dispatch": kept.dispatch, "logits": kept.logits}[field]
