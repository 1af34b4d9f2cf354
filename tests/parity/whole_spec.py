"""The torch backend's spec with the layers that it does not have yet, so that the planner can be held to them.

Sparse attention with its indexer and multi-token prediction are upstream's own modules on the torch backend's linear
layers and norms; the recurrent mixers are this project's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import (
    AbsorbedMLASelfAttention,
    AbsorbedMLASelfAttentionSubmodules,
)
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttention,
    DSAttentionSubmodules,
)
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer
from megacpp_stp.model.norm import RMSNorm
from megacpp_stp.model.specs import nam_torch_stack_spec


class Duplicated(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, init_method: Any, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        init_method(self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class KeyNorm(torch.nn.LayerNorm):
    """The indexer's: a LayerNorm in every model."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


_indexer = ModuleSpec(
    module=DSAIndexer,
    submodules=DSAIndexerSubmodules(
        linear_wq_b=Duplicated, linear_wk=Duplicated, k_norm=KeyNorm, linear_weights_proj=Duplicated
    ),
)
_dsa_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=AbsorbedMLASelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=AbsorbedMLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_down_proj=ColumnParallelLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_down_proj=ColumnParallelLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                core_attention=ModuleSpec(module=DSAttention, submodules=DSAttentionSubmodules(indexer=_indexer)),
                linear_proj=RowParallelLinear,
                q_layernorm=RMSNorm,
                kv_layernorm=RMSNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)
_prediction = ModuleSpec(
    module=MultiTokenPredictionBlock,
    submodules=MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=MultiTokenPredictionLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=RMSNorm,
                    hnorm=RMSNorm,
                    eh_proj=ColumnParallelLinear,
                    mtp_model_layer=None,
                    layer_norm=RMSNorm,
                ),
            )
        ]
    ),
)


class SlotMixer:
    """What a Mamba slot holds, by global layer number."""

    def __new__(cls, config: Any, *, specs: dict[int, ModuleSpec], layer_number: int, **kwargs: Any) -> Any:
        return build_module(specs[layer_number], config, layer_number=layer_number, **kwargs)


def whole_spec(args: Any) -> ModuleSpec:
    """The spec for parsed arguments."""
    specs = dict.fromkeys(args.nam_mamba3_layers or (), _mamba3(args))
    specs |= dict.fromkeys(args.nam_recurrent_layers or (), _m2rnn(args))
    mamba_layer = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm,
            mixer=ModuleSpec(module=SlotMixer, params={"specs": specs}),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    submodules = dataclasses.replace(
        nam_torch_stack_spec.submodules, dsa_layer=_dsa_layer, mtp_block_spec=_prediction, mamba_layer=mamba_layer
    )
    return dataclasses.replace(nam_torch_stack_spec, submodules=submodules)


def _mamba3(args: Any) -> ModuleSpec:
    fraction = 0.5 if args.nam_mamba3_complex_rotation else 0.0
    return ModuleSpec(module=Mamba3Mixer, params={"chunk_size": args.nam_mamba3_chunk_size, "rope_fraction": fraction})


def _m2rnn(args: Any) -> ModuleSpec:
    sizes = {"num_heads": "heads"} | {
        name: name for name in ("key_dim", "value_dim", "conv_kernel", "checkpoint_every")
    }
    return ModuleSpec(
        module=M2RNNMixer,
        params={name: getattr(args, f"nam_m2rnn_{ours}") for name, ours in sizes.items()},
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
