"""The layer specs of the NAM stack, one per backend.

``--spec megacpp_stp.model.specs nam_torch_stack_spec`` selects the torch backend: plain torch modules, no
Transformer Engine, so it runs on a CPU. Which mixer each of its Mamba slots holds is then read from Megatron's parsed
arguments when the slot is built; `torch_stack_spec` makes a spec that says it itself. ``nam_te_stack_spec`` is the
name of the Transformer Engine one, so that arguments can be checked; it refuses to be built.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
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
from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.norm import RMSNorm
from megacpp_stp.model.slots import SlotMixer, Slots
from megacpp_stp.model.sparse import DuplicatedLinear, IndexerKeyNorm, TorchSparseAttention
from megacpp_stp.model.stack import NamStack


class NotInTorchBackend:
    """Stands in the spec where the torch backend has no layer yet.

    Raises:
        BuildError: Always, when a pattern makes Megatron build it.
    """

    def __init__(self, *args: object, symbol: str, layer: str, **kwargs: object) -> None:
        raise BuildError(
            f"{layer} is not available in the torch backend yet",
            field="--hybrid-layer-pattern",
            value=symbol,
            fix="use a pattern without it, or another backend",
        )


class TransformerEngineStack:
    """Where the stack of Transformer Engine modules will be.

    Raises:
        BuildError: Always, when Megatron builds it.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise BuildError(
            "the Transformer Engine spec of the NAM stack is not built yet",
            field="--spec",
            value="nam_te_stack_spec",
            fix="use backend torch",
        )


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


def _mamba_layer(slots: Slots | None) -> ModuleSpec:
    # The projection of a mixer has no norm of its own here, so the layer's is the only one.
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm,
            mixer=ModuleSpec(module=SlotMixer, params={"slots": slots}),
            mamba_bda=get_bias_dropout_add,
        ),
    )


nam_torch_stack_spec = ModuleSpec(
    module=NamStack,
    params={"final_norm": RMSNorm},
    submodules=HybridStackSubmodules(
        attention_layer=_attention_layer,
        mla_layer=_mla_layer,
        mlp_layer=_mlp_layer,
        moe_layer=_moe_layer,
        mamba_layer=_mamba_layer(None),
        gdn_layer=ModuleSpec(module=NotInTorchBackend, params={"symbol": "G", "layer": "the gated delta net layer"}),
        dsa_layer=_sparse_layer,
        mtp_block_spec=_prediction,
    ),
)


def torch_stack_spec(slots: Slots) -> ModuleSpec:
    """The torch backend's spec for a model that is built without Megatron's parsed arguments.

    Args:
        slots: What its Mamba slots hold.
    """
    submodules = dataclasses.replace(nam_torch_stack_spec.submodules, mamba_layer=_mamba_layer(slots))
    return dataclasses.replace(nam_torch_stack_spec, submodules=submodules)


nam_te_stack_spec = ModuleSpec(module=TransformerEngineStack)
