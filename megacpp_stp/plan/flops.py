"""Floating-point operations a token, per layer, and what a block costs a pipeline stage.

Counted are the matrix products of the forward pass, a multiply-add as 2, as in megatron/training/training.py
(``num_floating_point_operations``, 0.19.2): norms, activations, softmax, rotary embedding and embedding lookup are
left out. Training is 3 times the forward pass: backward has one product for the input's gradient and one for the
weight's. Recomputation is not counted, neither the recipe's nor what a mixer does on its own.

Upstream's hybrid formula leaves out the router's product, the projection of multi-token prediction's two inputs, and
MLA and DSA layers, of which it knows none (it counts ``*`` only, so the TFLOP/s that 0.19.2 logs for a model with
``+`` or ``D`` layers are too low). It takes each layer ``M`` for a Mamba-2. `tests/parity/test_flops.py` compares the
rest.

Mixture of experts: a token pays for the experts that it is routed to, and for the shared one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacpp_stp.plan.layers import attention_of, mla_of, sparse_of
from megacpp_stp.plan.lowering import HybridPlan, lower
from megacpp_stp.plan.mixers import recurrence_flops
from megacpp_stp.plan.parameters import Part, PartKind, padded_vocab_size, parts
from megacpp_stp.recipe.schema import Recipe

MULTIPLY_ADD = 2
TRAINING_TO_FORWARD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Forward FLOPs a token.

    Attributes:
        matrices: Products with parameters.
        attention: Scores and values, and an indexer's scores, which grow with the sequence; causal.
        recurrence: What Mamba and M2RNN do between their projections.
    """

    matrices: int
    attention: int
    recurrence: int

    @property
    def forward(self) -> int:
        """All of the forward pass."""
        return self.matrices + self.attention + self.recurrence

    @property
    def training(self) -> int:
        """Forward and backward."""
        return TRAINING_TO_FORWARD * self.forward


def part_flops(recipe: Recipe, part: Part) -> Flops:
    """What one token costs in one part, averaged over the positions of a sequence."""
    model = recipe.model
    if part.kind == "output":
        # From the shape and not from the weights: a tied head has none of its own, and costs the same.
        products = padded_vocab_size(recipe) * model.hidden_size
    else:
        products = sum(weight.active for weight in part.weights if weight.is_matrix)
    if part.kind == "mtp":  # each depth goes through the output layer
        products += padded_vocab_size(recipe) * model.hidden_size
    recurrence = 0
    if part.kind in ("mamba2", "mamba3", "m2rnn"):
        recurrence = recurrence_flops(model, part.kind)
    return Flops(matrices=MULTIPLY_ADD * products, attention=_attention(recipe, part.kind), recurrence=recurrence)


def total(recipe: Recipe, chosen: tuple[Part, ...]) -> Flops:
    """What one token costs in several parts together."""
    each = [part_flops(recipe, part) for part in chosen]
    return Flops(
        matrices=sum(one.matrices for one in each),
        attention=sum(one.attention for one in each),
        recurrence=sum(one.recurrence for one in each),
    )


def by_family(recipe: Recipe, chosen: tuple[Part, ...]) -> dict[str, Flops]:
    """What one token costs in each family, in order of first occurrence."""
    families = dict.fromkeys(part.family for part in chosen)
    return {family: total(recipe, tuple(part for part in chosen if part.family == family)) for family in families}


def block_costs(recipe: Recipe) -> tuple[int, ...]:
    """Training FLOPs a token of each source block, for `megacpp_stp.plan.cuts`.

    The output head and multi-token prediction are added to the last block, which is always on their stage; the
    embedding's lookup costs nothing here. `recipe.parallel` is not looked at.
    """
    return costs_of_blocks(recipe, parts(recipe, _on_one_stage(recipe)))


def costs_of_blocks(recipe: Recipe, chosen: tuple[Part, ...]) -> tuple[int, ...]:
    """The same from all parts of the recipe, however they are cut."""
    costs = [0] * recipe.model.depth
    known: dict[PartKind, int] = {}  # what a part costs depends on its kind alone
    for part in chosen:
        if part.kind not in known:
            known[part.kind] = part_flops(recipe, part).training
        costs[part.home(len(costs)) - 1] += known[part.kind]
    return tuple(costs)


def _on_one_stage(recipe: Recipe) -> HybridPlan:
    whole = {"pipeline": 1, "virtual": 1}
    alone = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=whole)})
    return lower(alone, stages=(recipe.model.depth,))


def _attention(recipe: Recipe, kind: PartKind) -> int:
    """Forward FLOPs a token of scores and values.

    Query times key takes d and probabilities times value v multiply-adds for each head and each key. A causal mask
    leaves half of the sequence as keys, on average; kernels that skip the masked half reach this, a plain product of
    whole matrices does twice as much.

    Sparse attention is absorbed: a key is the latent and the rotary part, its value the latent. A query attends to
    `topk` keys, or to all before it where there are fewer, and its indexer scores them all. What the indexer's loss
    compares those scores with, the probabilities of all keys, is left out.
    """
    model, sequence = recipe.model, recipe.training.sequence_length
    if kind == "attention":
        return model.heads * 2 * attention_of(model).head_dim * sequence
    if kind == "mla":
        block = mla_of(model)
        return model.heads * (block.qk_head_dim + block.qk_pos_emb_head_dim + block.v_head_dim) * sequence
    if kind == "dsa":
        block, indexer = mla_of(model), sparse_of(model)
        topk = min(indexer.topk, sequence)
        twice_keys = 2 * topk * sequence - topk**2  # min(topk, keys before it), twice, of all positions together
        widths = 2 * block.kv_lora_rank + block.qk_pos_emb_head_dim
        scores = indexer.indexer_heads * indexer.indexer_head_dim * sequence
        return model.heads * widths * twice_keys // sequence + scores
    return 0
