"""How many parameters each Megatron layer has, exactly, and how they spread over the parallel groups.

Read off megatron-core 0.19.2's modules with the torch backend's spec, without biases (``--disable-bias-linear``) and
with a norm's weight only (RMSNorm). `tests/parity/test_parameter_count.py` builds the models and compares.

Legend: h hidden, f hidden width of an MLP or an expert, n heads, g key/value groups, d channels of a head, V padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import MLP_SYMBOL, MOE_SYMBOL, HybridPlan
from megacpp_stp.recipe.schema import Attention, Mla, Model, Moe, Recipe

VOCAB_MULTIPLE = 128
"""Megatron's default of ``--make-vocab-size-divisible-by``, which no recipe changes."""

MLA_SYMBOL, ATTENTION_SYMBOL = "+", "*"
EMBEDDING, OUTPUT = "embedding", "output"

Split = Literal["none", "tensor", "expert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter, or a module's parameters of one kind.

    Attributes:
        name: As in Megatron's module tree, from the layer down.
        count: Elements in the whole model, over all tensor- and expert-parallel ranks.
        active: Elements that one token meets: the experts that it is not routed to are left out.
        split: Over which group it is cut: ``none`` is whole on every rank, ``expert`` is cut over expert-parallel
            ranks and, inside each, over tensor-parallel ones (Megatron's default expert-tensor size).
        is_matrix: Whether a token is multiplied by it: one multiply-add an active element. False for norms and for
            the embedding, which is looked up.
    """

    name: str
    count: int
    active: int
    split: Split
    is_matrix: bool

    def on_gpu(self, *, tensor: int, expert: int) -> int:
        """Elements on one GPU. `tensor` and `expert` are the sizes of those groups."""
        return self.count // {"none": 1, "tensor": tensor, "expert": tensor * expert}[self.split]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What lies on one pipeline segment as a whole: the embedding, a layer, or the output (final norm and head).

    Attributes:
        name: ``embedding``, ``layer 3``, ``output``.
        family: The layer's source letter; ``embedding`` or ``output`` outside the blocks.
        symbol: Megatron's letter; empty outside the blocks.
        layer: Global layer number from 1; None outside the blocks.
        block: Source block number from 1; None outside the blocks.
        segment: Pipeline segment from 0.
        weights: Its parameters.
        copies: Elements it stores of weights that another segment owns: the tied output layer's copy of the embedding,
            when the two are on different segments.
    """

    name: str
    family: str
    symbol: str
    layer: int | None
    block: int | None
    segment: int
    weights: tuple[Weight, ...]
    copies: tuple[Weight, ...] = ()

    @property
    def total(self) -> int:
        """Elements, without copies."""
        return sum(weight.count for weight in self.weights)

    @property
    def active(self) -> int:
        """Elements that one token meets, without copies."""
        return sum(weight.active for weight in self.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameters of a family, a rank or a model: all of them, and those that one token meets."""

    total: int
    active: int


def padded_vocab_size(recipe: Recipe) -> int:
    """Rows of the embedding: the vocabulary rounded up as megatron/training/vocab_utils.py does."""
    multiple = VOCAB_MULTIPLE * recipe.parallel.tensor
    return -(-recipe.model.vocab_size // multiple) * multiple


def layer_weights(model: Model, symbol: str) -> tuple[Weight, ...]:
    """Parameters of one layer.

    Args:
        model: The recipe's network.
        symbol: Megatron's letter.

    Raises:
        UserError: A letter that this count does not know, or that the recipe does not describe.
    """
    if symbol not in _LAYERS:
        raise UserError(
            "has no parameter count",
            field="layer symbol",
            value=symbol,
            fix=f"known symbols: {' '.join(sorted(_LAYERS))}",
        )
    return tuple(_LAYERS[symbol](model))


def parts(recipe: Recipe, layout: HybridPlan) -> tuple[Part, ...]:
    """Everything with parameters, from the embedding to the output.

    Args:
        recipe: The resolved recipe.
        layout: Its lowering; says which layer lies on which segment.
    """
    model, last = recipe.model, len(layout.segments) - 1
    table = padded_vocab_size(recipe) * model.hidden_size
    by_symbol = {symbol: layer_weights(model, symbol) for symbol in {layer.symbol for layer in layout.layers}}
    embedding = Part(
        name=EMBEDDING,
        family=EMBEDDING,
        symbol="",
        layer=None,
        block=None,
        segment=0,
        weights=(_weight("embedding.word_embeddings", table, split="tensor", is_matrix=False),),
    )
    layers = (
        Part(
            name=f"layer {layer.number}",
            family=layer.family,
            symbol=layer.symbol,
            layer=layer.number,
            block=layer.block,
            segment=layer.segment,
            weights=by_symbol[layer.symbol],
        )
        for layer in layout.layers
    )
    head = _weight("output_layer", table, split="tensor")
    final_norm = _norm("decoder.final_norm", model.hidden_size)
    output = Part(
        name=OUTPUT,
        family=OUTPUT,
        symbol="",
        layer=None,
        block=None,
        segment=last,
        weights=(final_norm,) if model.tie_embeddings else (final_norm, head),
        # Upstream keeps a second, synchronised copy unless one model chunk has both ends.
        copies=(head,) if model.tie_embeddings and last > 0 else (),
    )
    return (embedding, *layers, output)


def count(chosen: tuple[Part, ...]) -> Count:
    """The parameters of some parts, copies left out."""
    return Count(total=sum(part.total for part in chosen), active=sum(part.active for part in chosen))


def by_family(chosen: tuple[Part, ...]) -> dict[str, Count]:
    """Parameters of each family that occurs, in order of first occurrence."""
    families = dict.fromkeys(part.family for part in chosen)
    return {family: count(tuple(part for part in chosen if part.family == family)) for family in families}


def of_rank(chosen: tuple[Part, ...], *, rank: int, pipeline: int) -> tuple[Part, ...]:
    """The parts on one pipeline rank, over its virtual stages."""
    return tuple(part for part in chosen if part.segment % pipeline == rank)


def _weight(name: str, count: int, *, split: Split, active: int | None = None, is_matrix: bool = True) -> Weight:
    return Weight(name=name, count=count, active=count if active is None else active, split=split, is_matrix=is_matrix)


def _norm(name: str, width: int) -> Weight:
    return _weight(name, width, split="none", is_matrix=False)


def _mla(model: Model) -> Iterator[Weight]:
    """``+``: low-rank query and key/value, a norm on each latent (multi_latent_attention.py, --qk-layernorm)."""
    block = model.families.A
    if not isinstance(block, Mla):
        raise _undescribed(MLA_SYMBOL, "mla")
    h, n, rope = model.hidden_size, model.heads, block.qk_pos_emb_head_dim
    yield _norm("input_layernorm", h)
    yield _weight("self_attention.linear_q_down_proj", h * block.q_lora_rank, split="tensor")
    yield _norm("self_attention.q_layernorm", block.q_lora_rank)
    yield _weight("self_attention.linear_q_up_proj", block.q_lora_rank * n * (block.qk_head_dim + rope), split="tensor")
    yield _weight("self_attention.linear_kv_down_proj", h * (block.kv_lora_rank + rope), split="tensor")
    yield _norm("self_attention.kv_layernorm", block.kv_lora_rank)
    yield _weight(
        "self_attention.linear_kv_up_proj",
        block.kv_lora_rank * n * (block.qk_head_dim + block.v_head_dim),
        split="tensor",
    )
    yield _weight("self_attention.linear_proj", n * block.v_head_dim * h, split="tensor")


def _attention(model: Model) -> Iterator[Weight]:
    """``*``: grouped-query attention (attention.py)."""
    block = model.families.A
    if not isinstance(block, Attention):
        raise _undescribed(ATTENTION_SYMBOL, "attention")
    h, n, g, d = model.hidden_size, model.heads, block.kv_groups, block.head_dim
    yield _norm("input_layernorm", h)
    yield _weight("self_attention.linear_qkv", h * (n + 2 * g) * d, split="tensor")
    yield _weight("self_attention.linear_proj", n * d * h, split="tensor")


def _mlp(model: Model) -> Iterator[Weight]:
    """``-``: dense MLP (mlp.py); swiglu's first matrix is twice as wide, for the gate."""
    h, f = model.hidden_size, model.ffn_hidden_size
    yield _norm("pre_mlp_layernorm", h)
    yield _weight("mlp.linear_fc1", h * f * _first_width(model), split="tensor")
    yield _weight("mlp.linear_fc2", f * h, split="tensor")


def _moe(model: Model) -> Iterator[Weight]:
    """``E``: router, routed experts, shared expert (moe_layer.py). The expert bias is a buffer, not a parameter."""
    block = model.families.E
    if not isinstance(block, Moe):
        raise _undescribed(MOE_SYMBOL, "moe")
    h, one = model.hidden_size, model.hidden_size * block.ffn_hidden_size
    shared = h * block.shared_ffn_hidden_size
    yield _norm("pre_mlp_layernorm", h)
    yield _weight("mlp.router", h * block.experts, split="none")
    for name, size in (("linear_fc1", one * _first_width(model)), ("linear_fc2", one)):
        yield _weight(f"mlp.experts.{name}", size * block.experts, active=size * block.topk, split="expert")
    if shared:
        yield _weight("mlp.shared_experts.linear_fc1", shared * _first_width(model), split="tensor")
        yield _weight("mlp.shared_experts.linear_fc2", shared, split="tensor")


def _first_width(model: Model) -> int:
    """Times f: the width of an MLP's first projection."""
    return 2 if model.activation == "swiglu" else 1


def _undescribed(symbol: str, block: str) -> UserError:
    return UserError(
        f"the layout has a layer {symbol!r}, but no family is a block of kind {block}",
        field="model.families",
        fix=f"describe a family with block: {block}",
    )


_LAYERS: dict[str, Callable[[Model], Iterator[Weight]]] = {
    MLA_SYMBOL: _mla,
    ATTENTION_SYMBOL: _attention,
    MLP_SYMBOL: _mlp,
    MOE_SYMBOL: _moe,
}
