"""The NAM stack of Transformer Engine's modules, as Megatron wraps them; ``--spec`` finds it in
`megacpp_stp.model.specs`.

Every layer has one norm before its mixer.  Where one projection alone reads the normed hidden states, the norm is in
that projection (``TELayerNormColumnParallelLinear``), as in upstream's ``hybrid_layer_specs.py``: attention, MLP,
Mamba-2.  Elsewhere it is a module before it.  MLA and sparse attention have a norm of their own on each latent, which
upstream's hybrid spec leaves to a flag and puts in one place in a model with sparse attention and in another in a model
without; named here, parameters have the same names in both, and those of the torch backend.
"""

from __future__ import annotations

from functools import partial

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
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

from megacpp_stp.model.slots import SlotLayer, SlotModules
from megacpp_stp.model.stack import AbsentLayer
from megacpp_stp.model.te_modules import TeMLASelfAttention, TeSparseAttention, TeStack, te_experts

_attention_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=TELayerNormColumnParallelLinear,
                core_attention=TEDotProductAttention,
                linear_proj=TERowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

_mla_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=TENorm,
        self_attention=ModuleSpec(
            module=TeMLASelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=TEColumnParallelLinear,
                linear_q_down_proj=TELinear,
                linear_q_up_proj=TEColumnParallelLinear,
                linear_kv_down_proj=TELinear,
                linear_kv_up_proj=TEColumnParallelLinear,
                core_attention=TEDotProductAttention,
                linear_proj=TERowParallelLinear,
                q_layernorm=TENorm,
                kv_layernorm=TENorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

# Transformer Engine has no sparse attention: the core is Megatron's own (dsa.py), whose kernel is an option.
_sparse_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=TENorm,
        self_attention=ModuleSpec(
            module=TeSparseAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=AbsorbedMLASelfAttentionSubmodules(
                linear_q_proj=TEColumnParallelLinear,
                linear_q_down_proj=TELinear,
                linear_q_up_proj=TEColumnParallelLinear,
                linear_kv_down_proj=TELinear,
                linear_kv_up_proj=TEColumnParallelLinear,
                core_attention=ModuleSpec(
                    module=DSAttention,
                    submodules=DSAttentionSubmodules(
                        indexer=ModuleSpec(
                            module=DSAIndexer,
                            submodules=DSAIndexerSubmodules(
                                linear_wq_b=TELinear,
                                linear_wk=TELinear,
                                k_norm=TENorm,  # a LayerNorm: the indexer asks for one, whatever the model's norm is
                                linear_weights_proj=TELinear,
                            ),
                        )
                    ),
                ),
                linear_proj=TERowParallelLinear,
                q_layernorm=TENorm,
                kv_layernorm=TENorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)

_mlp_layer = ModuleSpec(
    module=MLPLayer,
    submodules=TransformerLayerSubmodules(
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    ),
)

_moe_layer = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=TENorm,
        mlp=te_experts,
        mlp_bda=get_bias_dropout_add,
    ),
)

_mamba_layer = ModuleSpec(
    module=SlotLayer,
    params={
        "modules": SlotModules(
            norm=TENorm,
            in_proj=TEColumnParallelLinear,
            out_proj=TERowParallelLinear,
            normed_in_proj=TELayerNormColumnParallelLinear,
        )
    },
)

# One depth of multi-token prediction, as often as there are depths; its layers are those of the stack.
_prediction = ModuleSpec(
    module=MultiTokenPredictionBlock,
    submodules=MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=MultiTokenPredictionLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=TENorm,
                    hnorm=TENorm,
                    eh_proj=TEColumnParallelLinear,
                    mtp_model_layer=None,
                    layer_norm=TENorm,
                ),
            )
        ]
    ),
)

nam_te_stack_spec = ModuleSpec(
    module=TeStack,
    params={"final_norm": TENorm},
    submodules=HybridStackSubmodules(
        attention_layer=_attention_layer,
        mla_layer=_mla_layer,
        mlp_layer=_mlp_layer,
        moe_layer=_moe_layer,
        mamba_layer=_mamba_layer,
        gdn_layer=ModuleSpec(module=AbsentLayer, params={"symbol": "G", "what": "the gated delta net layer"}),
        dsa_layer=_sparse_layer,
        mtp_block_spec=_prediction,
    ),
)
