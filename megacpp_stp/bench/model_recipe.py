"""What ``bench model`` builds of a recipe: the whole model on one device, and of each kind of layer a model of one.

No torch. The recipes keep what decides the time of a layer (sizes, backend, precision, kernels, recomputation) and lose
what a layer alone has no part in: parallelism, STP, multi-token prediction, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.flops import part_flops
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.plan.parameters import MTP, Part, parts
from megacpp_stp.recipe.load import restore_recipe
from megacpp_stp.recipe.schema import Recipe

HEAD = "head"
"""Embedding, final norm, output layer and loss: the model without its layers."""

_FAMILY_OF = {
    "attention": "A",
    "mla": "A",
    "dsa": "A",
    "moe": "E",
    "mamba2": "M",
    "mamba3": "M",
    "m2rnn": "R",
}
# A dense MLP follows attention, and a head follows everything: alone, either is a stand-in's MLP.
_MLP_ALONE = {"M": {"block": "stand-in", "runs": "mlp", "instead_of": "mamba3"}}
_NEEDS_FAMILY = {"mla_up_proj": "A", "moe": "E", "moe_act": "E", "shared_experts": "E"}
_NEEDS_TE = ("layernorm", "moe_act")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What the planner counts of one kind of piece of a model.

    Attributes:
        piece: Which.
        families: The source letters that it occurs in; of the head none.
        count: How often the model has it, the layers of multi-token prediction among them.
        flops: Training FLOPs a token of one.
        parameters: Of one.
    """

    piece: str
    families: tuple[str, ...]
    count: int
    flops: int
    parameters: int


def on_one_device(
    recipe: Recipe,
    *,
    device: str,
    backend: str | None = None,
    sequence: int | None = None,
    micro_batch: int | None = None,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe's model whole on one device, and in words what that changes of its layers.

    Args:
        recipe: The recipe.
        device: ``cpu`` or ``cuda``. On a CPU the recurrences run on the kernels that are there, torch's.
        backend: ``torch`` or ``te``; None for the recipe's. The torch backend then does without what needs
            Transformer Engine.
        sequence: Tokens; None for the recipe's.
        micro_batch: Sequences; None for the recipe's.

    Raises:
        UserError: A value that no recipe can have.
    """
    data = recipe.model_dump(mode="json")
    notes: list[str] = []
    data["parallel"] |= {
        **dict.fromkeys(("tensor", "pipeline", "virtual", "context", "expert"), 1),
        "sequence_parallel": False,
        "stages": [recipe.model.depth],
    }
    data["launch"] |= {"nodes": 1, "processes_per_node": 1}
    data["stp"] = None
    training = data["training"]
    if sequence is not None and sequence != training["sequence_length"]:
        notes.append(f"sequences of {sequence} tokens, not {training['sequence_length']}")
        training["sequence_length"] = sequence
    if micro_batch is not None and micro_batch != training["micro_batch_size"]:
        notes.append(f"micro-batches of {micro_batch}, not {training['micro_batch_size']}")
        training["micro_batch_size"] = micro_batch
    training["global_batch_size"] = training["micro_batch_size"]
    training["checkpoint"] = None
    data["optimizer"] |= dict.fromkeys(("distributed", "overlap_grad_reduce", "overlap_param_gather"), False)
    if backend is not None and backend != recipe.model.backend:
        notes += _change_backend(data, backend)
    if device == "cpu":
        notes += _leave_gpu_kernels(data)
    return restore_recipe(data), tuple(notes)


def _change_backend(data: dict[str, Any], backend: str) -> Iterator[str]:
    yield f"backend {backend}, not {data['model']['backend']}"
    data["model"]["backend"] = backend
    if backend == "te":
        return
    experts = data["model"]["families"]["E"]
    if experts and experts["grouped_gemm"]:
        experts["grouped_gemm"] = False
        yield "experts one at a time, not grouped"
    recompute = data["training"]["recompute"]
    lost = [module for module in _NEEDS_TE if recompute and module in recompute["modules"]]
    if lost:
        _keep_modules(data, [module for module in recompute["modules"] if module not in lost])
        yield f"no recomputation of {' and '.join(lost)}, which needs Transformer Engine"


def _leave_gpu_kernels(data: dict[str, Any]) -> Iterator[str]:
    for family in ("M", "R"):
        block = data["model"]["families"][family]
        if block and block.get("kernel", "torch") != "torch":
            yield f"kernel torch, not {block['kernel']}, in family {family}"
            block["kernel"] = "torch"


def alone(whole: Recipe, piece: str) -> Recipe:
    """A model of one layer of a kind; for the head of a small MLP, which is left out when it is built.

    Args:
        whole: From `on_one_device`.
        piece: A kind of layer that it has, or `HEAD`.
    """
    data = whole.model_dump(mode="json")
    model = data["model"]
    family = _FAMILY_OF.get(piece)
    if family is None:
        model["families"] = dict(_MLP_ALONE)
    else:
        block = model["families"][family]
        if family == "A":
            block["dense_mlp"] = False
        if piece == "mla":
            block["sparse"] = None
        elif piece == "dsa":
            block["sparse"]["ranks"] = [0]
        model["families"] = {family: block}
    model |= {"pattern": next(iter(model["families"])), "depth": 1, "mtp": None}
    data["parallel"]["stages"] = [1]
    recompute = data["training"]["recompute"]
    if recompute and recompute["granularity"] == "selective":
        there = [module for module in recompute["modules"] if _NEEDS_FAMILY.get(module, family) == family]
        _keep_modules(data, there)
    return restore_recipe(data)


def _keep_modules(data: dict[str, Any], modules: Sequence[str]) -> None:
    recompute = data["training"]["recompute"]
    data["training"]["recompute"] = {**recompute, "modules": list(modules)} if modules else None


def shares(whole: Recipe, layout: HybridPlan) -> tuple[tuple[Share, ...], int]:
    """The pieces that can be timed, in order of first occurrence, the head last; and what they leave out.

    Args:
        whole: From `on_one_device`.
        layout: Its lowering.

    Returns:
        The shares; and training FLOPs a token of multi-token prediction beside its layers, which are in the shares.
    """
    layers: dict[str, list[Part]] = {}
    head, left_out = [], 0
    for part in parts(whole, layout):
        if part.symbol:
            layers.setdefault(part.kind, []).append(part)
        elif part.kind == MTP:
            left_out += part_flops(whole, part).training
        else:
            head.append(part)
    found = [
        Share(
            piece=piece,
            families=tuple(dict.fromkeys(part.family for part in chosen)),
            count=len(chosen),
            flops=part_flops(whole, chosen[0]).training,
            parameters=chosen[0].total,
        )
        for piece, chosen in layers.items()
    ]
    flops, parameters = sum(part_flops(whole, part).training for part in head), sum(part.total for part in head)
    return (*found, Share(piece=HEAD, families=(), count=1, flops=flops, parameters=parameters)), left_out


def chosen(found: Sequence[Share], wanted: Sequence[str]) -> tuple[Share, ...]:
    """The pieces that are asked for, by source letter or by name; all when none is.

    Raises:
        UserError: A letter or a name that the model does not have.
    """
    letters = dict.fromkeys(letter for share in found for letter in share.families)
    known = [*letters, *(share.piece for share in found)]
    for name in wanted:
        if name not in known:
            raise UserError(
                "is no part of this model", field="--family", value=name, fix=f"use one of {', '.join(known)}"
            )
    return tuple(share for share in found if not wanted or {share.piece, *share.families} & set(wanted))
