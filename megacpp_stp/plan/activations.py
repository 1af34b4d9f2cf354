"""What the torch backend keeps of a token between its forward and its backward pass. Estimates.

Read off what autograd saves on a CPU (`tests/parity/test_memory_estimate.py` measures it), without recomputation.
Two places differ from a GPU, both named below: norms, where a fused kernel keeps less, and the core of attention,
which is counted as a fused kernel keeps it. Left out: temporary buffers of either pass, the rotary tables, and STP's
rows.

Legend: h hidden, f hidden width of an MLP, V padded vocabulary; sizes in bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacpp_stp.plan.lowering import MLP_SYMBOL, MOE_SYMBOL
from megacpp_stp.plan.parameters import ATTENTION_SYMBOL, MLA_SYMBOL, OUTPUT, Part, padded_vocab_size
from megacpp_stp.recipe.schema import Attention, Mla, Moe, Recipe

FP32, INT64, BOOL = 4, 8, 1
COMPUTE_BYTES = {"fp32": FP32, "bf16": 2}

# Hidden widths f that an activation function keeps: its input or result, and the next product's input. Upstream's
# unfused swiglu keeps gate and value side by side (2), value plus an offset of 0, silu of the gate, and the product.
_KEPT_WIDTHS = {"squared-relu": 2, "gelu": 2, "swiglu": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes a token that one part keeps for its backward pass.

    Attributes:
        layer: What is in no other field.
        dispatch: Mixture of experts: the routed copies of the token, their places and probabilities.
        logits: Output head: the fp32 softmax that cross entropy keeps, and the logits in the compute dtype, which
            are alive beside it in forward (as is their gradient in backward).
    """

    layer: int = 0
    dispatch: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.layer + self.dispatch + self.logits


def kept_by(recipe: Recipe, part: Part) -> Kept:
    """What one token leaves in one part, on one rank without tensor or context parallelism."""
    element = COMPUTE_BYTES[recipe.training.precision]
    if part.family == OUTPUT:
        return _output(recipe, element)
    if part.symbol == MLA_SYMBOL:
        return Kept(layer=_mla(recipe, element))
    if part.symbol == ATTENTION_SYMBOL:
        return Kept(layer=_attention(recipe, element))
    if part.symbol == MLP_SYMBOL:
        return Kept(layer=_mlp_layer(recipe, element))
    if part.symbol == MOE_SYMBOL:
        return _moe(recipe, element)
    return Kept(layer=INT64)  # embedding: the token's id


def _norm(width: int, element: int) -> int:
    """RMSNorm's input and its normalised form in fp32, the root, and its output, which the next product keeps.

    A fused CUDA kernel computes the normalised form again: `FP32 * width` less.
    """
    return 2 * FP32 * width + FP32 + element * width


def _mlp_layer(recipe: Recipe, element: int) -> int:
    model = recipe.model
    return _norm(model.hidden_size, element) + _mlp(recipe, model.ffn_hidden_size, element)


def _mlp(recipe: Recipe, width: int, element: int) -> int:
    return _KEPT_WIDTHS[recipe.model.activation] * width * element


def _core(*, heads: int, groups: int, qk: int, v: int, element: int) -> int:
    """Query, key, value, result (which the output projection keeps too) and log-sum-exp.

    As a fused kernel keeps it. Without one (on a CPU, when key and value widths differ) torch keeps the scores too,
    `heads * sequence` elements a token.
    """
    return (heads * qk + groups * (qk + v) + heads * v) * element + FP32 * heads


def _mla(recipe: Recipe, element: int) -> int:
    model, block = recipe.model, recipe.model.families.A
    assert isinstance(block, Mla)  # `parts` has counted its weights
    latents = _norm(block.q_lora_rank, element) + _norm(block.kv_lora_rank, element)
    qk = block.qk_head_dim + block.qk_pos_emb_head_dim
    core = _core(heads=model.heads, groups=model.heads, qk=qk, v=block.v_head_dim, element=element)
    return _norm(model.hidden_size, element) + latents + core


def _attention(recipe: Recipe, element: int) -> int:
    model, block = recipe.model, recipe.model.families.A
    assert isinstance(block, Attention)
    core = _core(heads=model.heads, groups=block.kv_groups, qk=block.head_dim, v=block.head_dim, element=element)
    # Value is a view of the joint projection, so query and key before their rotation stay beside it.
    unrotated = (model.heads + block.kv_groups) * block.head_dim * element
    return _norm(model.hidden_size, element) + core + unrotated


def _moe(recipe: Recipe, element: int) -> Kept:
    """Balanced routing over the experts of one rank; with no expert parallelism their sum is the same for any."""
    model, block = recipe.model, recipe.model.families.E
    assert isinstance(block, Moe)
    # An expert also keeps its activation times the token's probability: one width more.
    experts = block.topk * (_mlp(recipe, block.ffn_hidden_size, element) + block.ffn_hidden_size * element)
    shared = _mlp(recipe, block.shared_ffn_hidden_size, element)
    # Scores and their sum, once for the choice and once for the balancing loss; the chosen ones and their places.
    router = 2 * FP32 * (block.experts + 1) + block.topk * (FP32 + 2 * INT64)
    # Each copy: the hidden state, its probability, and the indices of the permutation.
    copy = model.hidden_size * element + FP32 + 3 * INT64
    return Kept(
        layer=_norm(model.hidden_size, element) + experts + shared + router,
        dispatch=block.topk * copy,
    )


def _output(recipe: Recipe, element: int) -> Kept:
    vocabulary = padded_vocab_size(recipe)
    # fp32 logits are turned into the softmax in place.
    logits = 0 if element == FP32 else element * vocabulary
    small = BOOL + INT64  # cross entropy's mask and target
    return Kept(
        layer=_norm(recipe.model.hidden_size, element) + small,
        logits=FP32 * vocabulary + logits,
    )
