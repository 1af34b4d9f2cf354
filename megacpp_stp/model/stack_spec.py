"""The shape of the NAM stack: which layer holds which modules, the same for each backend.

Every layer has one norm before its mixer.  A backend that can put it into the projection which alone reads the normed
hidden states does so, as upstream's ``hybrid_layer_specs.py`` does: attention, MLP, Mamba-2.  Elsewhere it is a module
before the mixer.  MLA and sparse attention have a norm of their own on each latent, which upstream's hybrid spec leaves
to a flag and puts in one place in a model with sparse attention and in another in a model without; named here,
parameters have the same names in both, and in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
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
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megacpp_stp.model.slots import SlotLayer, SlotModules
from megacpp_stp.model.stack import AbsentLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the stack is built of.

    Attributes:
        stack: The decoder.
        norm: Before a mixer, on a latent, after the last layer.
        column: A column-parallel linear layer.
        normed_column: One with the norm of its input in it; None where there is none.
        row: A row-parallel linear layer.
        latent: Projects down to a latent.
        core_attention: Of dense attention.
        self_attention: Grouped-query attention.
        head_norm: On each head's q and k there, where the configuration asks for it; None where it cannot.
        mla: Multi-latent attention.
        sparse: Absorbed multi-latent attention around Megatron's sparse core.
        indexer: A linear layer of the indexer, which each tensor-parallel rank holds whole.
        indexer_norm: On its keys: a LayerNorm, whatever the model's norm is.
        experts: The MoE layer's spec or builder.
    """

    stack: type
    norm: LayerNormBuilder
    column: type
    normed_column: type | None
    row: type
    latent: type
    core_attention: type
    self_attention: type
    head_norm: LayerNormBuilder | None
    mla: type
    sparse: type
    indexer: type
    indexer_norm: LayerNormBuilder
    experts: Any

    @property
    def normed(self) -> type:
        """The projection that reads a layer's hidden states alone."""
        return self.normed_column or self.column

    def norm_before(self, norm: str, projection: str) -> dict[str, Any]:
        """The norm that `normed` does not hold, and where checkpoints have it: in the projection, in each backend."""
        if self.normed_column is not None:
            return {}
        return {norm: self.norm, "sharded_state_dict_keys_map": {f"{norm}.": f"{projection}.layer_norm_"}}


def stack_spec(backend: Backend) -> ModuleSpec:
    """The spec of the whole stack."""
    slot_modules = SlotModules(
        norm=backend.norm, in_proj=backend.column, out_proj=backend.row, normed_in_proj=backend.normed_column
    )
    return ModuleSpec(
        module=backend.stack,
        params={"final_norm": backend.norm},
        submodules=HybridStackSubmodules(
            attention_layer=_attention_layer(backend),
            mla_layer=_latent_layer(backend, _mla(backend)),
            mlp_layer=_mlp_layer(backend),
            moe_layer=_moe_layer(backend),
            mamba_layer=ModuleSpec(module=SlotLayer, params={"modules": slot_modules}),
            gdn_layer=ModuleSpec(module=AbsentLayer, params={"symbol": "G", "what": "the gated delta net layer"}),
            dsa_layer=_latent_layer(backend, _sparse(backend)),
            mtp_block_spec=_prediction(backend),
        ),
    )


def _attention_layer(backend: Backend) -> ModuleSpec:
    attention = ModuleSpec(
        module=backend.self_attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.normed,
            core_attention=backend.core_attention,
            linear_proj=backend.row,
            q_layernorm=backend.head_norm,
            k_layernorm=backend.head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            **backend.norm_before("input_layernorm", "self_attention.linear_qkv"),
        ),
    )


def _latent_layer(backend: Backend, attention: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _latents(backend: Backend) -> dict[str, Any]:
    return {
        "linear_q_proj": backend.column,
        "linear_q_down_proj": backend.latent,
        "linear_q_up_proj": backend.column,
        "linear_kv_down_proj": backend.latent,
        "linear_kv_up_proj": backend.column,
        "linear_proj": backend.row,
        "q_layernorm": backend.norm,
        "kv_layernorm": backend.norm,
    }


def _mla(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=backend.mla,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(core_attention=backend.core_attention, **_latents(backend)),
    )


def _sparse(backend: Backend) -> ModuleSpec:
    indexer = ModuleSpec(
        module=DSAIndexer,
        submodules=DSAIndexerSubmodules(
            linear_wq_b=backend.indexer,
            linear_wk=backend.indexer,
            k_norm=backend.indexer_norm,
            linear_weights_proj=backend.indexer,
        ),
    )
    core = ModuleSpec(module=DSAttention, submodules=DSAttentionSubmodules(indexer=indexer))
    return ModuleSpec(
        module=backend.sparse,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=AbsorbedMLASelfAttentionSubmodules(core_attention=core, **_latents(backend)),
    )


def _mlp_layer(backend: Backend) -> ModuleSpec:
    projections = MLPSubmodules(linear_fc1=backend.normed, linear_fc2=backend.row)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(MLP.as_mlp_submodule, submodules=projections),
            mlp_bda=get_bias_dropout_add,
            **backend.norm_before("pre_mlp_layernorm", "mlp.linear_fc1"),
        ),
    )


def _moe_layer(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm, mlp=backend.experts, mlp_bda=get_bias_dropout_add
        ),
    )


def _prediction(backend: Backend) -> ModuleSpec:
    """One depth of multi-token prediction, as often as there are depths; its layers are those of the stack."""
    depth = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column,
            mtp_model_layer=None,
            layer_norm=backend.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
    )
