"""Floating-point operations a token, per layer, and what a block costs a pipeline stage.

Counted are the matrix products of the forward pass, a multiply-add as 2, as in megatron/training/training.py
(``num_floating_point_operations``, 0.19.2): norms, activations, softmax, rotary embedding and embedding lookup are
left out. Training is 3 times the forward pass: backward has one product for the input's gradient and one for the
weight's. Recomputation is not counted.

Two things are counted that upstream's hybrid formula leaves out: the router's product, and MLA layers, of which it
knows none (it counts ``*`` only, so the TFLOP/s that 0.19.2 logs for a model with ``+`` layers are too low).
`tests/parity/test_flops.py` compares the rest.

Mixture of experts: a token pays for the experts that it is routed to, and for the shared one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacpp_stp.plan.lowering import HybridPlan, lower
from megacpp_stp.plan.parameters import ATTENTION_SYMBOL, MLA_SYMBOL, OUTPUT, Part, padded_vocab_size, parts
from megacpp_stp.recipe.schema import Attention, Mla, Recipe

MULTIPLY_ADD = 2
TRAINING_TO_FORWARD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Forward FLOPs a token.

    Attributes:
        matrices: Products with parameters.
        attention: Scores and values, which grow with the sequence; causal.
    """

    matrices: int
    attention: int

    @property
    def forward(self) -> int:
        """All of the forward pass."""
        return self.matrices + self.attention

    @property
    def training(self) -> int:
        """Forward and backward."""
        return TRAINING_TO_FORWARD * self.forward


def part_flops(recipe: Recipe, part: Part) -> Flops:
    """What one token costs in one part, averaged over the positions of a sequence."""
    if part.family == OUTPUT:
        # From the shape and not from the weights: a tied head has none of its own, and costs the same.
        products = padded_vocab_size(recipe) * recipe.model.hidden_size
    else:
        products = sum(weight.active for weight in part.weights if weight.is_matrix)
    return Flops(matrices=MULTIPLY_ADD * products, attention=_attention(recipe, part.symbol))


def total(recipe: Recipe, chosen: tuple[Part, ...]) -> Flops:
    """What one token costs in several parts together."""
    each = [part_flops(recipe, part) for part in chosen]
    return Flops(matrices=sum(one.matrices for one in each), attention=sum(one.attention for one in each))


def by_family(recipe: Recipe, chosen: tuple[Part, ...]) -> dict[str, Flops]:
    """What one token costs in each family, in order of first occurrence."""
    families = dict.fromkeys(part.family for part in chosen)
    return {family: total(recipe, tuple(part for part in chosen if part.family == family)) for family in families}


def block_costs(recipe: Recipe) -> tuple[int, ...]:
    """Training FLOPs a token of each source block, for `megacpp_stp.plan.cuts`.

    The output head is added to the last block, which is always on its stage; the embedding's lookup costs nothing
    here. `recipe.parallel.stages` is not looked at.
    """
    layout = _on_one_stage(recipe)
    costs = [0] * recipe.model.depth
    for part in parts(recipe, layout):
        block = recipe.model.depth if part.family == OUTPUT else part.block
        if block is not None:
            costs[block - 1] += part_flops(recipe, part).training
    return tuple(costs)


def _on_one_stage(recipe: Recipe) -> HybridPlan:
    whole = {"pipeline": 1, "virtual": 1, "stages": (recipe.model.depth,)}
    return lower(recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=whole)}))


def _attention(recipe: Recipe, symbol: str) -> int:
    """Forward FLOPs a token of scores and values.

    Query times key takes d and probabilities times value v multiply-adds for each head and each key. A causal mask
    leaves half of the sequence as keys, on average; kernels that skip the masked half reach this, a plain product of
    whole matrices does twice as much.
    """
    model, block = recipe.model, recipe.model.families.A
    if symbol == MLA_SYMBOL and isinstance(block, Mla):
        widths = block.qk_head_dim + block.qk_pos_emb_head_dim + block.v_head_dim
    elif symbol == ATTENTION_SYMBOL and isinstance(block, Attention):
        widths = 2 * block.head_dim
    else:
        return 0
    return MULTIPLY_ADD * model.heads * widths * recipe.training.sequence_length // 2
