"""The layer specs of the NAM stack, one per backend.

``--spec megacpp_stp.model.specs nam_torch_stack_spec`` selects the torch backend: plain torch modules, no
Transformer Engine, so it runs on a CPU. Which mixer each of its Mamba slots holds is then read from Megatron's parsed
arguments when the slot is built; `torch_stack_spec` makes a spec that says it itself. ``nam_te_stack_spec`` selects
Transformer Engine's modules (`megacpp_stp.model.te_specs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttentionSubmodules
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttention,
    DSAttentionSubmodules,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megacpp_stp.model.attention import SdpaCoreAttention, TorchMLASelfAttention, TorchSelfAttention
from megacpp_stp.model.norm import RMSNorm
from megacpp_stp.model.slots import SlotLayer, SlotModules, Slots
from megacpp_stp.model.sparse import DuplicatedLinear, IndexerKeyNorm, TorchSparseAttention
from megacpp_stp.model.stack import AbsentLayer, NamStack
from megacpp_stp.model.te_specs import nam_te_stack_spec

__all__ = ["nam_te_stack_spec", "nam_torch_stack_spec", "te_stack_spec", "torch_stack_spec"]

_attention_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=TorchSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=SdpaCoreAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=RMSNorm,
                k_layernorm=RMSNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        # In checkpoints the norm is where Transformer Engine has it, as in upstream's specs without it.
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    ),
)

_mla_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=TorchMLASelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_down_proj=ColumnParallelLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_down_proj=ColumnParallelLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                core_attention=SdpaCoreAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=RMSNorm,
                kv_layernorm=RMSNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

_mlp_layer = ModuleSpec(
    module=MLPLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    ),
)

_moe_layer = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm,
        # num_experts only says "there are experts" (upstream asserts that it is not None and drops it): their
        # number is the configuration's, here as in upstream's own hybrid spec.
        mlp=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
        mlp_bda=get_bias_dropout_add,
    ),
)

_sparse_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=TorchSparseAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=AbsorbedMLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_down_proj=ColumnParallelLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_down_proj=ColumnParallelLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                core_attention=ModuleSpec(
                    module=DSAttention,
                    submodules=DSAttentionSubmodules(
                        indexer=ModuleSpec(
                            module=DSAIndexer,
                            submodules=DSAIndexerSubmodules(
                                linear_wq_b=DuplicatedLinear,
                                linear_wk=DuplicatedLinear,
                                k_norm=IndexerKeyNorm,
                                linear_weights_proj=DuplicatedLinear,
                            ),
                        )
                    ),
                ),
                linear_proj=RowParallelLinear,
                q_layernorm=RMSNorm,
                kv_layernorm=RMSNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

# One depth of multi-token prediction, as often as there are depths; its layers are those of the stack.
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


_slot_modules = SlotModules(norm=RMSNorm, in_proj=ColumnParallelLinear, out_proj=RowParallelLinear, normed_in_proj=None)


nam_torch_stack_spec = ModuleSpec(
    module=NamStack,
    params={"final_norm": RMSNorm},
    submodules=HybridStackSubmodules(
        attention_layer=_attention_layer,
        mla_layer=_mla_layer,
        mlp_layer=_mlp_layer,
        moe_layer=_moe_layer,
        mamba_layer=ModuleSpec(module=SlotLayer, params={"modules": _slot_modules}),
        gdn_layer=ModuleSpec(module=AbsentLayer, params={"symbol": "G", "what": "the gated delta net layer"}),
        dsa_layer=_sparse_layer,
        mtp_block_spec=_prediction,
    ),
)


def torch_stack_spec(slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    """The torch backend's spec for a model that is built without our options among Megatron's parsed arguments.

    Args:
        slots: What its Mamba slots hold, or what says it when they are built.
    """
    return _with_slots(nam_torch_stack_spec, slots)


def te_stack_spec(slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    """The te backend's; see `torch_stack_spec`."""
    return _with_slots(nam_te_stack_spec, slots)


def _with_slots(stack: ModuleSpec, slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    layer = stack.submodules.mamba_layer
    chosen = dataclasses.replace(layer, params={**layer.params, "slots": slots})
    return dataclasses.replace(stack, submodules=dataclasses.replace(stack.submodules, mamba_layer=chosen))
