"""Attention of the torch backend: causal core attention, and Megatron's two projections around it.

Legend: s sequence, b batch, n query heads and g key/value heads of this tensor-parallel rank (n is a
multiple of g), d query/key channels of a head, v value channels of a head.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.model.errors import BuildError


def reference_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention as the formula reads: the oracle of the tests, for any floating dtype.

    Args:
        query: [s, b, n, d].
        key: [s, b, g, d].
        value: [s, b, g, v].
        scale: Multiplies the scores.

    Returns:
        [s, b, n * v], in the dtype of the inputs.
    """
    s, b, n, _ = query.shape
    key = key.repeat_interleave(n // key.shape[2], dim=2)
    value = value.repeat_interleave(n // value.shape[2], dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    future = torch.ones(s, s, dtype=torch.bool, device=query.device).triu(diagonal=1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("bnst,tbnv->sbnv", weights, value).reshape(s, b, -1)


class SdpaCoreAttention(MegatronModule):
    """Causal core attention through ``torch.nn.functional.scaled_dot_product_attention``.

    Upstream's ``DotProductAttention`` cannot serve: it knows one head size for keys and values, so MLA
    cannot build it, and it holds the [b, n, s, s] scores.

    Args:
        config: Megatron's configuration.
        layer_number: Global layer number, from 1.
        attn_mask_type: Must be causal.
        attention_type: Must be ``"self"``.
        attention_dropout: Overrides ``config.attention_dropout``.
        softmax_scale: Multiplies the scores; 1 / sqrt(d) when None.
        k_channels: d; ``config.kv_channels`` when None.
        v_channels: Unused, read from the value tensor. MLA passes it.
        cp_comm_type: Unused: there is no context parallelism here.
        pg_collection: Unused: the heads that arrive are this rank's.

    Raises:
        BuildError: The configuration asks for something that this class does not compute exactly.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_sdpa_lacks(config, layer_number, attn_mask_type, attention_type)
        channels = config.kv_channels if k_channels is None else k_channels
        self.softmax_scale = 1.0 / math.sqrt(channels) if softmax_scale is None else softmax_scale
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d].
            value: [s, b, g, v].
            attention_mask: None, or a boolean mask (True hides) that is exactly the causal one.
            attn_mask_type: None or causal.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [s, b, n * v], in the dtype of the query.

        Raises:
            UserError: Packed sequences, a bias, a cache, or a mask other than the causal one.
        """
        _refuse_inputs(query, key, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        s, b, n, _ = query.shape
        dropout_p = self.dropout_p if self.training else 0.0
        # Each tensor-parallel rank holds other heads, so it draws from its own stream.
        with get_cuda_rng_tracker().fork() if dropout_p > 0.0 else nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                dropout_p=dropout_p,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != n,
            )
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)


class TorchSelfAttention(SelfAttention):
    """Megatron's grouped-query attention; the spec's query and key norms are built with ``--qk-layernorm``.

    Upstream refuses a spec that names norms while the flag is off, and a spec cannot see the flag.
    """

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *args: object, **kwargs: object
    ) -> None:
        if not config.qk_layernorm:
            submodules = dataclasses.replace(submodules, q_layernorm=None, k_layernorm=None)
        super().__init__(config, submodules, *args, **kwargs)


class TorchMLASelfAttention(MLASelfAttention):
    """Megatron's multi-latent attention with a norm on the query latent and on the key-value latent, as in DeepSeek.

    Upstream puts the two norms there under ``--qk-layernorm`` only: as modules when the spec names them, fused into
    the up-projections with Transformer Engine.  Parameters and arithmetic are the same; without the flag there are
    none, which is another model.

    Raises:
        BuildError: The two norms are off, cannot be, or would get a wrong gradient.
    """

    def __init__(self, config: MLATransformerConfig, *args: object, **kwargs: object) -> None:
        refuse_latent_attention(config)
        super().__init__(config, *args, **kwargs)

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Upstream's, with the key-value latent whole in h and cut in s, as its Transformer Engine path has it.

        Left as the column-parallel projection cuts it, upstream gathers it without summing the gradient of the
        rotary key, which every rank's heads share.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            whole = gather_from_tensor_model_parallel_region(key_value, group=self.tp_group)
            key_value = scatter_to_sequence_parallel_region(whole, group=self.tp_group)
        return query, key_value


def refuse_latent_attention(config: MLATransformerConfig) -> None:
    """Refuse MLA without its two norms, or with a wrong gradient for them.

    Args:
        config: Megatron's configuration.

    Raises:
        BuildError: The norms are off, cannot be, or would get a wrong gradient.
    """
    if config.q_lora_rank is None:
        raise BuildError(
            "the NAM stack has MLA with a query latent only",
            field="--q-lora-rank",
            fix="set --q-lora-rank",
        )
    if not config.qk_layernorm:
        raise BuildError(
            "MLA without it has no norm on its latents, unlike DeepSeek's",
            field="--qk-layernorm",
            value=False,
            fix="pass --qk-layernorm",
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        # finalize_model_grads picks "q_layernorm" by name and sums it over the tensor-parallel group; the
        # latent is whole on every rank there, so the sum would be the gradient times the group's size.
        raise BuildError(
            "MLA's query norm gets a wrong gradient under tensor parallelism without sequence parallelism",
            field="--sequence-parallel",
            fix="pass --sequence-parallel",
        )


def _refuse_what_sdpa_lacks(
    config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str
) -> None:
    if attn_mask_type != AttnMaskType.causal or attention_type != "self":
        raise BuildError(
            "the torch backend has causal self-attention only",
            field="attention",
            value=f"{attention_type}, {attn_mask_type.name}",
        )
    if config.context_parallel_size > 1:
        raise BuildError(
            "the torch backend has no context parallelism",
            field="--context-parallel-size",
            value=config.context_parallel_size,
            fix="use 1, or the te backend",
        )
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        raise BuildError("the torch backend has no sliding window", field="--window-size", value=config.window_size)
    if config.softmax_type != "vanilla":
        raise BuildError(
            "the torch backend has the plain softmax only", field="--softmax-type", value=config.softmax_type
        )
    if config.qk_clip or config.log_max_attention_logit:
        raise BuildError(
            "the torch backend never sees the attention scores",
            field="--qk-clip" if config.qk_clip else "--log-max-attention-logit",
            fix="leave it out",
        )


def _refuse_inputs(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: AttnMaskType | None,
    attention_bias: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
) -> None:
    if packed_seq_params is not None:
        raise UserError("the torch backend has no packed sequences", fix="train on unpacked samples")
    if attention_bias is not None:
        raise UserError("the torch backend has no attention bias")
    if attn_mask_type not in (None, AttnMaskType.causal):
        raise UserError("the torch backend has causal attention only", value=attn_mask_type.name)
    s = query.shape[0]
    if key.shape[0] != s:
        raise UserError(
            "the torch backend has no key-value cache",
            field="keys",
            value=f"{key.shape[0]} keys for {s} queries",
        )
    if attention_mask is not None:
        causal = torch.ones(s, s, dtype=torch.bool, device=attention_mask.device).triu(diagonal=1)
        if not torch.equal(attention_mask, causal.expand_as(attention_mask)):
            raise UserError(
                "the torch backend has the causal mask only, and got another",
                field="attention_mask",
                fix="pass --no-create-attention-mask-in-dataloader, and no --reset-attention-mask",
            )
