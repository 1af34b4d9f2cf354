"""Memory of one part of a model on one GPU: what it always takes, and what a microbatch adds.

A rank's memory is a sum over its parts and nothing else, so that `megacpp_stp.plan.fitting` can search for a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_stp.plan.activations import kept_by, kept_without_recompute, passing
from megacpp_stp.plan.checks import data_parallel_size
from megacpp_stp.plan.kept import COMPUTE_BYTES, FP32
from megacpp_stp.plan.parameters import Part
from megacpp_stp.plan.weight import Split
from megacpp_stp.recipe.schema import Recipe

ADAM_MOMENTS = 2

_FP8_COPIES = 2
"""Bytes beside a bf16 weight: Transformer Engine casts it once for all microbatches, and keeps its transpose too, since
a Hopper GPU multiplies fp8 in one layout alone.  By reading; never measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one part on one GPU, but for `elements`.

    Attributes:
        elements: Parameters, copies included.
        weights: The parameters, and their fp8 copies.
        gradients: DDP's buffers: fp32 in either precision (``validate_args`` turns
            accumulate_allreduce_grads_in_fp32 on for bf16).
        state: Adam: two fp32 moments and, of a bf16 weight, an fp32 copy; cut over data-parallel ranks by the
            distributed optimizer, which cuts neither weights nor gradients.
        step: What torch's AdamW holds besides while it steps: one more fp32 copy of all second moments.
        activations: What one microbatch leaves.
        dispatch: Likewise, the routed copies of its tokens.
        scores: Likewise, scores of sparse attention.
        logits: Likewise, of output heads.
        again: What there is of one microbatch only while the part's passes run: what recomputation brings back, and
            temporaries of sparse attention.
        scores_again: Scores of sparse attention that recomputation brings back, among it.
        attention_pass: Temporaries of sparse attention beside its scores, among it.
        indexer_loss: What the indexer and its loss need above both, among it.
    """

    elements: int
    weights: int
    gradients: int
    state: int
    step: int
    activations: int
    dispatch: int
    scores: int
    logits: int
    again: int
    scores_again: int
    attention_pass: int = 0
    indexer_loss: int = 0

    @property
    def always(self) -> int:
        """What is there from the start to the end."""
        return self.weights + self.gradients + self.state

    @property
    def microbatch(self) -> int:
        """All that one microbatch leaves."""
        return self.activations + self.dispatch + self.scores + self.logits


def footprints(recipe: Recipe, chosen: Sequence[Part]) -> tuple[Footprint, ...]:
    """One of each part."""
    shards = _shards(recipe)
    known: dict[tuple[object, ...], Footprint] = {}
    found = []
    for part in chosen:
        key = (part.kind, part.family, part.weights, part.copies)
        if key not in known:
            known[key] = _footprint(recipe, part, shards)
        found.append(known[key])
    return tuple(found)


def _footprint(recipe: Recipe, part: Part, shards: dict[Split, int]) -> Footprint:
    parallel, training = recipe.parallel, recipe.training
    fp32 = training.precision == "fp32"
    elements = weights = state = step = 0
    for weight in (*part.weights, *part.copies):
        here = weight.on_gpu(tensor=parallel.tensor, expert=parallel.expert)
        stepped = -(-here // shards[weight.split]) if recipe.optimizer.distributed else here
        elements += here
        weights += here * (FP32 if weight.keeps_fp32 else COMPUTE_BYTES[training.precision])
        if weight.is_matrix and part.layer is not None and training.fp8 and part.family in training.fp8.families:
            weights += here * _FP8_COPIES
        state += stepped * FP32 * (ADAM_MOMENTS + (0 if fp32 or weight.keeps_fp32 else 1))
        step += stepped * FP32
    tokens = training.sequence_length * training.micro_batch_size // parallel.context
    kept = kept_by(recipe, part).on_gpu(parallel)
    everything = kept_without_recompute(recipe, part).on_gpu(parallel)
    attention, indexer = passing(recipe, part).on_gpu(parallel)
    attention = max(attention, everything["scores"])
    attention_pass = tokens * (attention - everything["scores"])
    indexer_loss = tokens * max(0, indexer - attention)
    back = tokens * max(0, sum(everything.values()) - sum(kept.values()))
    return Footprint(
        elements=elements,
        weights=weights,
        gradients=FP32 * elements,
        state=state,
        step=step,
        activations=tokens * kept["layer"],
        dispatch=tokens * kept["dispatch"],
        scores=tokens * kept["scores"],
        logits=tokens * kept["logits"],
        again=back + attention_pass + indexer_loss,
        scores_again=tokens * (everything["scores"] - kept["scores"]),
        attention_pass=attention_pass,
        indexer_loss=indexer_loss,
    )


def _shards(recipe: Recipe) -> dict[Split, int]:
    """Over how many GPUs the distributed optimizer cuts the state of a weight.

    Data x context, and for experts what their own groups leave of the world.
    """
    parallel, launch = recipe.parallel, recipe.launch
    dense = data_parallel_size(recipe) * parallel.context
    world = launch.nodes * launch.processes_per_node
    experts = max(1, world // (parallel.pipeline * parallel.tensor * parallel.expert))
    return {"none": dense, "tensor": dense, "expert": experts}
