"""Bytes that context parallelism sends: what a layer must know of the parts of a sequence that other ranks have.

* Attention through Transformer Engine, in a ring (``p2p``): keys and values go round once forward; backward they go
  round again, and their gradients with them (Liu et al. 2023, arXiv 2310.01889; ``AttnFuncWithCPAndKVP2P`` in
  transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py).
* The same where the recipe has sparse layers, for which all of attention gathers (``all_gather``): keys and values are
  gathered in either pass, and their gradients reduce-scattered (``AttnFuncWithCPAndKVAllGather``).
* Sparse attention: the latent key, and the indexer's, are gathered, and their gradients reduce-scattered (``dsa.py``
  of megatron-core 0.19.2, ``DSAttention.forward``); the value is the latent.
* Mamba-2: all-to-all to heads and back, of either pass (``ssm/mamba_context_parallel.py``).

What is small beside these is left out: the rows that STP samples, and the borders of multi-token prediction.  What has
no context parallelism yet is not counted, and the plan says so.

Legend: t tensor, c context; widths are elements a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.flow import Flow, collective
from megacpp_stp.plan.kept import COMPUTE_BYTES
from megacpp_stp.plan.parameters import Part, of_rank
from megacpp_stp.plan.placement import Placement
from megacpp_stp.recipe.blocks import Attention, Mamba2, Mla
from megacpp_stp.recipe.schema import Recipe

KEYS = "keys and values, and their gradients"
HEADS = "channels of Mamba-2 to their heads and back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Elements a token that a rank hands to each operation in a step, for one microbatch.

    Attributes:
        ring: To its neighbour, each time that keys and values move on.
        gathered: Of its part of what is gathered.
        scattered: Likewise of gradients that are reduce-scattered.
        exchanged: Of what goes all-to-all.
    """

    ring: int = 0
    gathered: int = 0
    scattered: int = 0
    exchanged: int = 0

    def __add__(self, other: Widths) -> Widths:
        """Of both."""
        return Widths(
            ring=self.ring + other.ring,
            gathered=self.gathered + other.gathered,
            scattered=self.scattered + other.scattered,
            exchanged=self.exchanged + other.exchanged,
        )


def context_flows(plan: RunPlan, placement: Placement, chosen: tuple[Part, ...]) -> Iterator[Flow]:
    """Each operation of the rank that has most of it; nothing without context parallelism.

    Args:
        plan: The plan.
        placement: Of its ranks.
        chosen: The parts of its model.
    """
    recipe, context = plan.recipe, plan.recipe.parallel.context
    if context == 1:
        return
    ranks = []
    for rank in range(plan.layout.pipeline):
        found = Widths()
        for part in of_rank(chosen, rank=rank, pipeline=plan.layout.pipeline):
            found += widths(recipe, part.kind)
        ranks.append(found)
    training = recipe.training
    tokens = training.sequence_length * training.micro_batch_size // context * plan.micro_batches
    own = tokens * COMPUTE_BYTES[training.precision]
    # A ring moves what an all-gather of the same tensors does: each to all others, by way of the neighbour.
    yield collective(placement, "context", "ring", KEYS, max(one.ring for one in ranks) * own * context)
    yield collective(
        placement, "context", "all-gather", "keys and values", max(one.gathered for one in ranks) * own * context
    )
    yield collective(
        placement, "context", "reduce-scatter", "their gradients", max(one.scattered for one in ranks) * own * context
    )
    yield collective(placement, "context", "all-to-all", HEADS, max(one.exchanged for one in ranks) * own)


def widths(recipe: Recipe, kind: str) -> Widths:
    """Of one layer of a kind, both passes and recomputation; nothing for a kind that exchanges nothing.

    Args:
        recipe: The resolved recipe.
        kind: As `megacpp_stp.plan.lowering.Kind`.
    """
    recompute = recipe.training.recompute
    whole = recompute is not None and recompute.granularity == "full"
    core = recompute is not None and (whole or "core_attn" in recompute.modules)
    if kind == "mamba2":
        return Widths(exchanged=_mamba2(recipe) * (3 if whole else 2))
    if recipe.model.backend != "te":  # whose attention alone has it
        return Widths()
    if kind == "dsa":
        return _sparse(recipe, forward=2 if core else 1)
    if kind not in ("mla", "attention"):
        return Widths()
    width = _keys_and_values(recipe)
    block = recipe.model.families.A
    if isinstance(block, Mla) and block.sparse is not None:
        return Widths(gathered=width * (3 if core else 2), scattered=width)
    return Widths(ring=width * (4 if core else 3))


def _keys_and_values(recipe: Recipe) -> int:
    block, tensor = recipe.model.families.A, recipe.parallel.tensor
    if isinstance(block, Attention):
        return 2 * block.kv_groups * block.head_dim // tensor
    assert isinstance(block, Mla)  # expanded to all heads before attention
    return recipe.model.heads * (block.qk_head_dim + block.qk_pos_emb_head_dim + block.v_head_dim) // tensor


def _sparse(recipe: Recipe, *, forward: int) -> Widths:
    """One key for all heads, whole on each tensor-parallel rank."""
    block = recipe.model.families.A
    assert isinstance(block, Mla) and block.sparse is not None
    key, indexer = block.kv_lora_rank + block.qk_pos_emb_head_dim, block.sparse.indexer_head_dim
    learns = block.sparse.loss_coeff > 0
    return Widths(gathered=forward * (key + indexer), scattered=key + (indexer if learns else 0))


def _mamba2(recipe: Recipe) -> int:
    """Gate, input, both projections of the state and step sizes one way, the result the other.

    A group is repeated where there are fewer than ranks, so that each has one.
    """
    block, parallel = recipe.model.families.M, recipe.parallel
    assert isinstance(block, Mamba2)
    inner = block.heads * block.head_dim // parallel.tensor
    groups = max(block.groups // parallel.tensor, parallel.context)
    return 3 * inner + 2 * groups * block.state_dim + block.heads // parallel.tensor
