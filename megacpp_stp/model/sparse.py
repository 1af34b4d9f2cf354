"""Sparse attention of the torch backend: Megatron's absorbed MLA and DSA on plain linear layers.

Source: DeepSeek-V3.2-Exp's report, section 2.1; megatron-core's ``absorbed_mla.py`` and ``dsa.py``.  In the absorbed
form queries and keys have kv_lora_rank + qk_pos_emb_head_dim channels and values kv_lora_rank, one key/value head for
all queries, and each query attends to the top-k keys that the indexer finds.  The core is upstream's ``DSAttention``,
on its plain path or by the row in its table of kernels that ``config.dsa_kernel_backend`` names.

Legend: s sequence (a shard of it under sequence parallelism), b batch, h hidden, c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megacpp_stp.model.attention import refuse_latent_attention
from megacpp_stp.model.errors import BuildError


class DuplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole, as the indexer has them.

    Ranks initialise it alike: from the stream that they share.

    Args:
        input_size: Channels in.
        output_size: Channels out.
        config: Megatron's configuration.
        init_method: Fills the weight [output_size, input_size] in place.
        bias: Must be False.
        skip_bias_add: Unused: there is no bias.
        skip_weight_param_allocation: Must be False.
        parallel_mode: Must be ``"duplicated"``.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool,
        parallel_mode: str,
    ) -> None:
        super().__init__()
        assert not bias and not skip_weight_param_allocation and parallel_mode == "duplicated"
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``x`` [..., input_size] to [..., output_size], and no bias."""
        return torch.nn.functional.linear(x, self.weight), None


class IndexerKeyNorm(torch.nn.Module):
    """LayerNorm with bias over the indexer's key channels: the one norm that is no RMSNorm, in every model.

    Computed in fp32 (fp64 when the input is fp64) and cast back, as `megacpp_stp.model.norm.RMSNorm`.

    Args:
        config: Megatron's configuration.
        hidden_size: c.
        eps: Added to the variance.

    Raises:
        BuildError: The configuration asks for a zero-centred weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.layernorm_zero_centered_gamma:
            raise BuildError(
                "the torch backend stores the norm's weight itself, not its distance from one",
                field="--apply-layernorm-1p",
                fix="leave --apply-layernorm-1p out",
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ([..., c]); same shape and dtype out."""
        compute = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(compute), self.bias.to(compute)
        return torch.nn.functional.layer_norm(x.to(compute), self.weight.shape, weight, bias, self.eps).to(x.dtype)


class TorchSparseAttention(AbsorbedMLASelfAttention):
    """Megatron's absorbed MLA with a norm on each latent, [s, b, h] in and out.

    Raises:
        BuildError: See `megacpp_stp.model.attention.TorchMLASelfAttention`; and dropout, which sparse attention would
            leave out, or context parallelism.
    """

    def __init__(self, config: MLATransformerConfig, *args: object, **kwargs: object) -> None:
        refuse_latent_attention(config)
        if config.attention_dropout:
            raise BuildError(
                "sparse attention has no dropout",
                field="--attention-dropout",
                value=config.attention_dropout,
                fix="pass --attention-dropout 0.0",
            )
        if config.context_parallel_size > 1:
            raise BuildError(
                "the torch backend has no context parallelism",
                field="--context-parallel-size",
                value=config.context_parallel_size,
                fix="use 1, or the te backend",
            )
        super().__init__(config, *args, **kwargs)
        if config.tensor_model_parallel_size > 1:
            self.linear_kv_down_proj.register_forward_hook(self._whole_latent)

    def _whole_latent(self, _module: torch.nn.Module, _inputs: object, output: tuple[Tensor, None]) -> object:
        """The key-value latent whole in h and cut in s, as upstream's Transformer Engine path has it.

        Left as the column-parallel projection cuts it, upstream gathers it without summing the gradient of the
        rotary key, which every rank's heads share.
        """
        whole = gather_from_tensor_model_parallel_region(output[0], group=self.tp_group)
        return scatter_to_sequence_parallel_region(whole, group=self.tp_group), output[1]
