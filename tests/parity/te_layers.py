"""One layer of each kind on both backends, from one set of weights: on a GPU, or on the CPU with the double.

Legend: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from tests.parity.te_names import torch_name

S, B, H = 128, 2, 256
KINDS = ("*", "+", "D", "-", "E", "E grouped", "M", "M rotated", "R")


def configuration(kind: str, dtype: torch.dtype, *, backend: str, device: str) -> Any:
    """Megatron's, small but with head sizes that Transformer Engine's fused kernels take.

    All experts see each token and all keys each query, so that rounding picks no others: what is picked is Megatron's
    own affair in both backends.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings: dict[str, Any] = {
        **{"num_layers": 1, "hidden_size": H, "ffn_hidden_size": 384, "num_attention_heads": 4, "kv_channels": 64},
        **{"normalization": "RMSNorm", "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        **{"activation_func": torch.nn.functional.silu, "gated_linear_unit": True, "init_method_std": 0.1},
        **{"num_moe_experts": 4, "moe_router_topk": 4, "moe_ffn_hidden_size": 128, "moe_aux_loss_coeff": 1e-2},
        **{"moe_shared_expert_intermediate_size": 128, "moe_router_score_function": "sigmoid"},
        **{"moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall"},
        **{"moe_router_dtype": "fp32", "moe_grouped_gemm": kind == "E grouped" and backend == "te"},
        **{"mamba_num_heads": 8, "mamba_head_dim": 32, "mamba_state_dim": 32, "mamba_num_groups": 2},
        **{"is_hybrid_model": True, "use_cpu_initialization": device == "cpu", "bias_dropout_fusion": False},
        **{"gradient_accumulation_fusion": False, "masked_softmax_fusion": False, "bias_activation_fusion": False},
        **{"apply_rope_fusion": False, "persist_layer_norm": False, "params_dtype": dtype, "pipeline_dtype": dtype},
        **{
            "bf16": dtype == torch.bfloat16,
            "transformer_impl": "local" if backend == "torch" else "transformer_engine",
        },
    }
    if kind not in ("+", "D"):
        return TransformerConfig(**settings, num_query_groups=2)
    latent: dict[str, Any] = {
        **{"multi_latent_attention": True, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_head_dim": 64},
        **{"qk_pos_emb_head_dim": 64, "v_head_dim": 64, "rope_type": "rope", "qk_layernorm": True},
    }
    if kind == "D":
        latent |= {
            **{"experimental_attention_variant": "dsa", "dsa_indexer_n_heads": 4, "dsa_indexer_head_dim": 64},
            **{"dsa_indexer_topk": S, "dsa_indexer_loss_coeff": 0.1, "dsa_indexer_rotate_activation": False},
        }
    return MLATransformerConfig(**settings, **latent)


def build(kind: str, dtype: torch.dtype, *, backend: str, device: str) -> Any:
    """The layer, with weights by its parameters' names."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megacpp_stp.model.slots import Slots
    from megacpp_stp.model.specs import te_stack_spec, torch_stack_spec

    config = configuration(kind, dtype, backend=backend, device=device)
    slots = Slots(
        mamba3=frozenset({1} if kind[0] == "M" else ()),
        m2rnn=frozenset({1} if kind == "R" else ()),
        mamba2=frozenset({1} if kind == "mamba2" else ()),
        mamba3_options={"chunk_size": 32, "rope_fraction": 0.5 if kind == "M rotated" else 0.0},
        m2rnn_options={"num_heads": 8, "key_dim": 16, "value_dim": 16, "conv_kernel": 4, "checkpoint_every": 32},
    )
    layers = {"torch": torch_stack_spec, "te": te_stack_spec}[backend](slots).submodules
    spec = {
        **{"*": layers.attention_layer, "+": layers.mla_layer, "D": layers.dsa_layer, "-": layers.mlp_layer},
        **{"E": layers.moe_layer, "M": layers.mamba_layer, "R": layers.mamba_layer, "m": layers.mamba_layer},
    }[kind[0]]
    common: dict[str, Any] = {"pg_collection": ProcessGroupCollection.use_mpu_process_groups()}
    common |= {"name": "decoder.layers.0"} if kind[0] in "MRm" else {"add_layer_offset": False}
    layer = build_module(spec, config=config, layer_number=1, **common).to(device)
    fill(layer)
    return layer.train()


def fill(layer: Any) -> None:
    """Weights that depend on the torch backend's name of each alone."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            seed = int(hashlib.sha256(torch_name(name).encode()).hexdigest()[:8], 16)
            noise = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            if name.endswith("dt_bias"):
                noise = noise - 3
            elif parameter.dim() == 1 and "bias" not in name:
                noise = noise + 1
            parameter.copy_(noise)


def passed(layer: Any, dtype: torch.dtype, *, device: str) -> dict[str, Tensor]:
    """Output and gradients of one pass, in fp32 on the CPU, by the torch backend's names."""
    generator = torch.Generator().manual_seed(5)
    x, cotangent = (torch.randn(S, B, H, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    out = layer(hidden_states=x, attention_mask=None)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(cotangent)
    assert x.grad is not None
    found = {"output": out - x, "gradient of the input": x.grad - cotangent}  # without what the residual passes on
    found |= {torch_name(name): p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of output and gradients against the torch backend in fp32, by name.

    Attributes:
        te: Of the te backend in the dtype in question.
        torch: Of the torch backend in that dtype.
    """

    te: dict[str, float]
    torch: dict[str, float]


def compare(kind: str, dtype: torch.dtype, *, device: str) -> Errors:
    """One layer on both backends."""
    exact = passed(build(kind, torch.float32, backend="torch", device=device), torch.float32, device=device)
    found = {}
    for backend in ("te", "torch"):
        ours = passed(build(kind, dtype, backend=backend, device=device), dtype, device=device)
        assert ours.keys() == exact.keys(), ours.keys() ^ exact.keys()
        found[backend] = {name: float((ours[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    return Errors(**found)
