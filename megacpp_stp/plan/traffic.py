"""Bytes that GPUs send each other in one optimizer step, by process group.

Counted are tensors as large as the hidden states, the tokens of experts, weights and gradients.  Left out are what is
small beside them (low-rank parts of MLA, router statistics, losses, norms), evaluation, checkpoints, and the
synchronisation of tied embeddings.  `tests/parity/test_traffic.py` counts what Megatron sends.

Legend: b micro batch, s sequence, h hidden, t tensor, c context, e expert-parallel size, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.context_traffic import context_flows
from megacpp_stp.plan.flow import Flow, collective
from megacpp_stp.plan.kept import COMPUTE_BYTES, FP32
from megacpp_stp.plan.lowering import Kind, Layer
from megacpp_stp.plan.parameters import Part, of_rank, parts
from megacpp_stp.plan.placement import Axis, Placement, place
from megacpp_stp.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """How often a layer moves whole hidden states over its tensor-parallel group, with sequence parallelism.

    Without it each reduce-scatter is an all-reduce, and there is no gather.

    Attributes:
        forward: Gathers and reduce-scatters of a forward pass.
        backward: Of a backward pass, which gathers the input of each column-parallel layer once more instead of
            keeping it (``tensor_parallel/layers.py``; Korthikanti et al. 2022, arXiv 2205.05198).
    """

    forward: tuple[int, int]
    backward: tuple[int, int]


_PAIR = Moves(forward=(1, 1), backward=(2, 1))  # one column-parallel and one row-parallel layer
_NONE = Moves(forward=(0, 0), backward=(0, 0))
_ENDS = {"embedding": Moves(forward=(0, 1), backward=(1, 0)), "output": Moves(forward=(1, 0), backward=(1, 1))}
# The torch backend projects down by two column-parallel layers; Transformer Engine's are whole on each rank. The
# indexer of sparse attention gathers its input.
_OF_MLA: dict[str, dict[Kind, Moves]] = {
    "torch": {"mla": Moves(forward=(2, 1), backward=(3, 2)), "dsa": Moves(forward=(3, 1), backward=(3, 2))},
    "te": {"mla": Moves(forward=(0, 1), backward=(1, 0)), "dsa": Moves(forward=(1, 1), backward=(1, 0))},
}


def flows(plan: RunPlan) -> tuple[Flow, ...]:
    """All communication of one optimizer step that is worth its bytes."""
    placement = place(plan.recipe)
    chosen = parts(plan.recipe, plan.layout)
    found = (
        *_of_layers(plan, placement, chosen),
        *context_flows(plan, placement, chosen),
        *_of_experts(plan, placement),
        *_of_pipeline(plan, placement),
        *_of_optimizer(plan, placement, chosen),
    )
    return tuple(flow for flow in found if flow.sent)


def hidden_bytes(recipe: Recipe) -> int:
    """Of the hidden states of one microbatch: s x b x h / c elements, whole over the tensor-parallel ranks."""
    training, parallel = recipe.training, recipe.parallel
    tokens = training.sequence_length * training.micro_batch_size // parallel.context
    return tokens * recipe.model.hidden_size * COMPUTE_BYTES[training.precision]


def _of_layers(plan: RunPlan, placement: Placement, chosen: tuple[Part, ...]) -> Iterator[Flow]:
    recipe, layout = plan.recipe, plan.layout
    ranks = []
    for rank in range(layout.pipeline):
        here = [_moves(recipe, part) for part in of_rank(chosen, rank=rank, pipeline=layout.pipeline)]
        ranks.append([sum(one[place] for one in here) for place in (0, 1)])
    whole = plan.micro_batches * hidden_bytes(recipe)
    gathers, scatters = (max(counts[place] for counts in ranks) * whole for place in (0, 1))
    if recipe.parallel.sequence_parallel:
        yield collective(placement, "tensor", "all-gather", "hidden states", gathers)
        yield collective(placement, "tensor", "reduce-scatter", "hidden states", scatters)
    else:
        yield collective(placement, "tensor", "all-reduce", "hidden states", scatters)


def _moves(recipe: Recipe, part: Part) -> tuple[int, int]:
    """Gathers and reduce-scatters of one microbatch, both passes and recomputation."""
    moves = _ENDS.get(part.kind, _NONE) if part.layer is None and part.kind in _ENDS else _of_kind(recipe, part.kind)
    again = 1 if _is_recomputed(recipe, part.kind) else 0
    gathers, scatters = (
        forward * (1 + again) + backward for forward, backward in zip(moves.forward, moves.backward, strict=True)
    )
    return gathers, scatters


def _of_kind(recipe: Recipe, kind: str) -> Moves:
    experts = recipe.model.families.E
    if kind == "moe":  # the shared expert; routed ones have rows of their own
        return _PAIR if experts is not None and experts.shared_ffn_hidden_size else _NONE
    if kind in ("mla", "dsa"):
        return _OF_MLA[recipe.model.backend]["mla" if kind == "mla" else "dsa"]
    return _NONE if kind == "mtp" else _PAIR


def _is_recomputed(recipe: Recipe, kind: str) -> bool:
    recompute = recipe.training.recompute
    if recompute is None:
        return False
    if recompute.granularity == "full":
        return kind not in _ENDS
    return {"mlp": "mlp", "moe": "moe"}.get(kind, "") in recompute.modules or (
        kind == "moe" and "shared_experts" in recompute.modules
    )


def _of_experts(plan: RunPlan, placement: Placement) -> Iterator[Flow]:
    """The way of tokens to their experts and back (``moe/token_dispatcher.py``), in both passes."""
    recipe, experts = plan.recipe, plan.recipe.model.families.E
    if experts is None:
        return
    layers = _most_on_a_rank(plan, "moe")
    recompute = recipe.training.recompute
    passes = 3 if recompute and (recompute.granularity == "full" or "moe" in recompute.modules) else 2
    tensor = recipe.parallel.tensor
    own = hidden_bytes(recipe) // tensor * plan.micro_batches * layers * passes  # there or back, all passes
    if experts.dispatcher == "allgather":
        whole = own * placement.size("tensor and expert")
        yield collective(placement, "tensor and expert", "all-gather", "tokens of all experts", whole)
        yield collective(placement, "tensor and expert", "reduce-scatter", "tokens of all experts", whole)
        return
    routed = own * experts.topk
    yield collective(placement, "expert", "all-to-all", "tokens to their experts and back", 2 * routed)
    yield collective(placement, "tensor", "all-gather", "tokens of an expert", routed * tensor)
    yield collective(placement, "tensor", "reduce-scatter", "tokens of an expert", routed * tensor)


def _most_on_a_rank(plan: RunPlan, kind: Kind) -> int:
    """Layers of a kind on the pipeline rank that has most, those of multi-token prediction too."""
    layout = plan.layout

    def on(rank: int) -> Sequence[Layer]:
        last = layout.mtp * layout.mtp_depths if rank == layout.pipeline - 1 else ()
        return (*layout.rank_layers(rank), *last)

    return max(sum(layer.kind == kind for layer in on(rank)) for rank in range(layout.pipeline))


def _of_pipeline(plan: RunPlan, placement: Placement) -> Iterator[Flow]:
    """Hidden states to the next segment and their gradients back, one tensor a microbatch and border."""
    layout, recipe = plan.layout, plan.recipe
    if layout.pipeline == 1:
        return
    one = hidden_bytes(recipe) // (recipe.parallel.tensor if recipe.parallel.sequence_parallel else 1)
    last = layout.pipeline * layout.virtual - 1
    borders = [0] * layout.pipeline
    for segment in range(last + 1):
        borders[segment % layout.pipeline] += (segment < last) + (segment > 0)
    payload = max(borders) * plan.micro_batches * one
    crossing = _crossing_sends(plan, placement) * plan.micro_batches * one
    yield Flow(
        axis="pipeline",
        operation="send",
        what="hidden states and their gradients",
        size=layout.pipeline,
        payload=payload,
        sent=payload,
        over_network=crossing,
    )


def _crossing_sends(plan: RunPlan, placement: Placement) -> int:
    """Tensors a microbatch that the busiest node sends to other nodes."""
    layout, sends = plan.layout, [0] * placement.nodes
    last = layout.pipeline * layout.virtual - 1
    for group in placement.groups("pipeline"):
        for segment in range(last):
            one, other = (placement.node_of(group[index % layout.pipeline]) for index in (segment, segment + 1))
            if one != other:
                sends[one] += 1  # hidden states
                sends[other] += 1  # their gradients
    return max(sends)


def _of_optimizer(plan: RunPlan, placement: Placement, chosen: tuple[Part, ...]) -> Iterator[Flow]:
    """Gradients, in fp32 (``grad_reduce_in_fp32``), and with the distributed optimizer the weights."""
    recipe = plan.recipe
    axes: tuple[tuple[Axis, str, bool], ...] = (("data", "", False), ("expert data", " of experts", True))
    for axis, of, is_expert in axes:
        found = [
            _weights(recipe, of_rank(chosen, rank=rank, pipeline=plan.layout.pipeline), experts=is_expert)
            for rank in range(plan.layout.pipeline)
        ]
        gradients, weights = max(gradients for gradients, _ in found), max(weights for _, weights in found)
        if recipe.optimizer.distributed:
            yield collective(placement, axis, "reduce-scatter", f"gradients{of}", gradients)
            yield collective(placement, axis, "all-gather", f"weights{of}", weights)
        else:
            yield collective(placement, axis, "all-reduce", f"gradients{of}", gradients)


def _weights(recipe: Recipe, chosen: Sequence[Part], *, experts: bool) -> tuple[int, int]:
    """Bytes of the gradients and of the weights of some parts on one GPU."""
    parallel, compute = recipe.parallel, COMPUTE_BYTES[recipe.training.precision]
    gradients = weights = 0
    for weight in (weight for part in chosen for weight in (*part.weights, *part.copies)):
        if (weight.split == "expert") == experts:
            count = weight.on_gpu(tensor=parallel.tensor, expert=parallel.expert)
            gradients += count * FP32
            weights += count * (FP32 if weight.keeps_fp32 else compute)
    return gradients, weights
