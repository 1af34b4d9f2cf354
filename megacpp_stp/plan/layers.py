"""How many parameters each Megatron layer has, exactly.

Read off megatron-core 0.19.2's modules, without biases (``--disable-bias-linear``) and with a norm's weight only
(RMSNorm); the recurrent mixers are in `megacpp_stp.plan.mixers`.

Legend: h hidden, f hidden width of an MLP or an expert, n heads, g key/value groups, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import Kind
from megacpp_stp.plan.mixers import m2rnn_weights, mamba2_weights, mamba3_weights, undescribed
from megacpp_stp.plan.weight import Split, Weight, matrix, vector
from megacpp_stp.recipe.blocks import Attention, Mla, Moe, Sparse
from megacpp_stp.recipe.schema import Model


def layer_weights(model: Model, kind: Kind) -> tuple[Weight, ...]:
    """Parameters of one layer.

    Args:
        model: The recipe's network.
        kind: What runs in the layer.

    Raises:
        UserError: A kind that this count does not know, or that the recipe does not describe.
    """
    if kind not in _LAYERS:
        raise UserError("has no parameter count", field="kind", value=kind, fix=f"known: {' '.join(_LAYERS)}")
    return tuple(_LAYERS[kind](model))


def prediction_weights(model: Model) -> tuple[Weight, ...]:
    """What one depth of multi-token prediction has beside its layers (multi_token_prediction.py)."""
    h = model.hidden_size
    return (
        vector("enorm", h),
        vector("hnorm", h),
        matrix("eh_proj", 2 * h * h, split="tensor"),
        vector("final_layernorm", h),
    )


def mla_of(model: Model) -> Mla:
    """Family A as a block of multi-head latent attention."""
    if not isinstance(model.families.A, Mla):
        raise undescribed("mla")
    return model.families.A


def sparse_of(model: Model) -> Sparse:
    """What family A says about sparse attention."""
    sparse = mla_of(model).sparse
    if sparse is None:
        raise UserError(
            "the layout has a layer of kind 'dsa'", field="model.families.A.sparse", fix="describe its indexer"
        )
    return sparse


def attention_of(model: Model) -> Attention:
    """Family A as a block of grouped-query attention."""
    if not isinstance(model.families.A, Attention):
        raise undescribed("attention")
    return model.families.A


def moe_of(model: Model) -> Moe:
    """Family E."""
    if not isinstance(model.families.E, Moe):
        raise undescribed("moe")
    return model.families.E


def _mla(model: Model) -> Iterator[Weight]:
    """``+``: low-rank query and key/value, a norm on each latent (multi_latent_attention.py, --qk-layernorm).

    The down-projections are column-parallel in the torch backend, and whole on every rank with Transformer Engine
    (``TELinear`` in hybrid_layer_specs.py).
    """
    block = mla_of(model)
    h, n, rope = model.hidden_size, model.heads, block.qk_pos_emb_head_dim
    down: Split = "none" if model.backend == "te" else "tensor"
    yield vector("input_layernorm", h)
    yield matrix("self_attention.linear_q_down_proj", h * block.q_lora_rank, split=down)
    yield vector("self_attention.q_layernorm", block.q_lora_rank)
    yield matrix("self_attention.linear_q_up_proj", block.q_lora_rank * n * (block.qk_head_dim + rope), split="tensor")
    yield matrix("self_attention.linear_kv_down_proj", h * (block.kv_lora_rank + rope), split=down)
    yield vector("self_attention.kv_layernorm", block.kv_lora_rank)
    yield matrix(
        "self_attention.linear_kv_up_proj",
        block.kv_lora_rank * n * (block.qk_head_dim + block.v_head_dim),
        split="tensor",
    )
    yield matrix("self_attention.linear_proj", n * block.v_head_dim * h, split="tensor")


def _dsa(model: Model) -> Iterator[Weight]:
    """``D``: MLA in its absorbed form, of the same weights, and the indexer (dsa.py), whole on every rank.

    The key's norm is a LayerNorm whatever the model's is, so it has a bias.
    """
    block, indexer = mla_of(model), sparse_of(model)
    yield from _mla(model)
    h, name = model.hidden_size, "self_attention.core_attention.indexer"
    yield matrix(
        f"{name}.linear_wq_b", block.q_lora_rank * indexer.indexer_heads * indexer.indexer_head_dim, split="none"
    )
    yield matrix(f"{name}.linear_wk", h * indexer.indexer_head_dim, split="none")
    yield vector(f"{name}.k_norm", indexer.indexer_head_dim)
    yield vector(f"{name}.k_norm.bias", indexer.indexer_head_dim)
    yield matrix(f"{name}.linear_weights_proj", h * indexer.indexer_heads, split="none")


def _attention(model: Model) -> Iterator[Weight]:
    """``*``: grouped-query attention (attention.py)."""
    block = attention_of(model)
    h, n, g, d = model.hidden_size, model.heads, block.kv_groups, block.head_dim
    yield vector("input_layernorm", h)
    yield matrix("self_attention.linear_qkv", h * (n + 2 * g) * d, split="tensor")
    yield matrix("self_attention.linear_proj", n * d * h, split="tensor")


def _mlp(model: Model) -> Iterator[Weight]:
    """``-``: dense MLP (mlp.py); swiglu's first matrix is twice as wide, for the gate."""
    h, f = model.hidden_size, model.ffn_hidden_size
    yield vector("pre_mlp_layernorm", h)
    yield matrix("mlp.linear_fc1", h * f * _first_width(model), split="tensor")
    yield matrix("mlp.linear_fc2", f * h, split="tensor")


def _moe(model: Model) -> Iterator[Weight]:
    """``E``: router, routed experts, shared expert (moe_layer.py). The expert bias is a buffer, not a parameter."""
    block = moe_of(model)
    h, one = model.hidden_size, model.hidden_size * block.ffn_hidden_size
    shared = h * block.shared_ffn_hidden_size
    yield vector("pre_mlp_layernorm", h)
    yield matrix("mlp.router", h * block.experts, split="none")
    for name, size in (("linear_fc1", one * _first_width(model)), ("linear_fc2", one)):
        yield matrix(f"mlp.experts.{name}", size * block.experts, active=size * block.topk, split="expert")
    if shared:
        yield matrix("mlp.shared_experts.linear_fc1", shared * _first_width(model), split="tensor")
        yield matrix("mlp.shared_experts.linear_fc2", shared, split="tensor")


def _first_width(model: Model) -> int:
    """Times f: the width of an MLP's first projection."""
    return 2 if model.activation == "swiglu" else 1


_LAYERS: dict[Kind, Callable[[Model], Iterator[Weight]]] = {
    "attention": _attention,
    "mla": _mla,
    "dsa": _dsa,
    "mlp": _mlp,
    "moe": _moe,
    "mamba2": mamba2_weights,
    "mamba3": mamba3_weights,
    "m2rnn": m2rnn_weights,
}
