"""The torch backend's norm and attention against plain formulas, and what they refuse.

Legend: s sequence, b batch, h hidden, n query heads, g key/value heads, d and v channels of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megacpp_stp.errors import UserError
from megacpp_stp.model.attention import SdpaCoreAttention, TorchMLASelfAttention, reference_attention
from megacpp_stp.model.norm import RMSNorm


def make_config(*, mla: bool = False, **changes: Any) -> TransformerConfig:
    """A small NAM: grouped-query attention, or MLA; a gated MLP; four routed experts and a shared one."""
    settings: dict[str, Any] = {
        "num_layers": 6,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": None if mla else 2,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_token_dispatcher_type": "alltoall",
        "is_hybrid_model": True,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "qk_layernorm": True,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
    }
    latent: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 10,
        "rope_type": "rope",
    }
    if mla:
        return MLATransformerConfig(**{**settings, **latent, **changes})
    return TransformerConfig(**{**settings, **changes})


# --- norm ---------------------------------------------------------------------------------------


def norm_of(size: int, dtype: Any, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(make_config(params_dtype=dtype), size, eps)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.3, 1.7, size))
    return norm


def test_norm_equals_torch_in_fp64_forward_and_backward():
    ours, theirs = norm_of(33, torch.float64), torch.nn.RMSNorm(33, eps=1e-5, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 3, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.cos().sum().backward()
        results.append((out, leaf.grad, norm.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_norm_computes_in_fp32_and_casts_back_once():
    norm = norm_of(64, torch.bfloat16)
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) * 300).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), 1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.float().bfloat16())


def test_norm_adds_eps_to_the_mean_square():
    out = norm_of(4, torch.float64, eps=0.5)(torch.zeros(1, 4, dtype=torch.float64) + 0.5)
    expected = 0.5 / (0.25 + 0.5) ** 0.5 * torch.linspace(0.3, 1.7, 4, dtype=torch.float64)
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("parallel", [False, True])
def test_norm_marks_its_weight_for_sequence_parallelism(parallel):
    changes = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if parallel else {}
    assert RMSNorm(make_config(**changes), 8).weight.sequence_parallel is parallel


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"normalization": "LayerNorm"}, "--normalization"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
    ],
)
def test_norm_refuses_what_it_does_not_compute(changes, field):
    with pytest.raises(UserError) as caught:
        RMSNorm(dataclasses.replace(make_config(), **changes), 8)
    assert caught.value.field == field


# --- core attention -----------------------------------------------------------------------------


def core_attention(config: TransformerConfig | None = None, **arguments: Any) -> SdpaCoreAttention:
    settings: dict[str, Any] = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return SdpaCoreAttention(config=config or make_config(), **{**settings, **arguments})


def qkv(s: int, b: int, n: int, g: int, d: int, v: int, dtype: Any = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(s * 100 + n)
    shapes = ((s, b, n, d), (s, b, g, d), (s, b, g, v))
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("s", "b", "n", "g", "d", "v"),
    [(1, 1, 1, 1, 1, 1), (7, 2, 4, 4, 5, 5), (13, 3, 6, 2, 9, 9), (17, 1, 4, 4, 12, 7), (9, 2, 6, 1, 3, 11)],
)
@pytest.mark.parametrize("scale", [None, 0.37])
def test_attention_equals_the_formula(s, b, n, g, d, v, scale):
    tensors = qkv(s, b, n, g, d, v)
    attention = core_attention(k_channels=d, v_channels=v, softmax_scale=scale)
    out = attention(*tensors, attention_mask=None, attn_mask_type=AttnMaskType.causal)
    expected = reference_attention(*tensors, scale=d**-0.5 if scale is None else scale)
    assert out.shape == (s, b, n * v)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((out * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_the_reference_itself_is_causal_and_averages():
    """By hand: with equal scores, position t gets the mean of the values up to t, of its own group of heads."""
    query, key = torch.zeros(3, 1, 2, 1), torch.ones(3, 1, 1, 1)
    value = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1, 1)
    assert reference_attention(query, key, value, scale=1.0)[:, 0].tolist() == [[1, 1], [2, 2], [4, 4]]


def test_the_causal_mask_may_be_passed_and_no_other():
    tensors = qkv(6, 1, 2, 2, 4, 4)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(diagonal=1).view(1, 1, 6, 6)
    attention = core_attention(k_channels=4)
    assert torch.equal(attention(*tensors, attention_mask=causal), attention(*tensors, attention_mask=None))
    two_documents = causal.clone()
    two_documents[..., 3:, :3] = True
    with pytest.raises(UserError, match="causal mask only"):
        attention(*tensors, attention_mask=two_documents)


@pytest.mark.parametrize(
    "inputs",
    [
        {"packed_seq_params": object()},
        {"attention_bias": torch.zeros(1)},
        {"attn_mask_type": AttnMaskType.no_mask},
    ],
)
def test_attention_refuses_inputs_it_does_not_compute(inputs):
    with pytest.raises(UserError):
        core_attention()(*qkv(6, 1, 4, 2, 8, 8), attention_mask=None, **inputs)


def test_attention_refuses_a_cache():
    query, _, _ = qkv(2, 1, 2, 2, 4, 4)
    _, key, value = qkv(6, 1, 2, 2, 4, 4)
    with pytest.raises(UserError, match="6 keys for 2 queries"):
        core_attention()(query, key, value, attention_mask=None)


@pytest.mark.parametrize(
    ("changes", "arguments", "field"),
    [
        ({"context_parallel_size": 2}, {}, "--context-parallel-size"),
        ({"window_size": (4, 0)}, {}, "--window-size"),
        ({"softmax_type": "learnable"}, {}, "--softmax-type"),
        ({"log_max_attention_logit": True}, {}, "--log-max-attention-logit"),
        ({}, {"attn_mask_type": AttnMaskType.no_mask}, "attention"),
        ({}, {"attention_type": "cross"}, "attention"),
    ],
)
def test_attention_refuses_configurations_it_does_not_compute(changes, arguments, field):
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UserError) as caught:
        core_attention(config, **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"qk_layernorm": False}, "--qk-layernorm"),
        ({"q_lora_rank": None}, "--q-lora-rank"),
        ({"tensor_model_parallel_size": 2}, "--sequence-parallel"),
    ],
)
def test_mla_refuses_to_train_without_its_two_norms(changes, field):
    with pytest.raises(UserError) as caught:
        TorchMLASelfAttention(make_config(mla=True, **changes), submodules=None, layer_number=1)
    assert caught.value.field == field
