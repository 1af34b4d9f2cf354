"""RMSNorm for the torch backend.

Legend: s sequence (a shard of it under sequence parallelism), b batch, h hidden.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megacpp_stp.model.errors import BuildError


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Computed in fp32 (fp64 when the input is fp64) and cast back, weight product included: what
    Transformer Engine does, so that the two backends round alike.  Upstream's ``WrappedTorchNorm`` cannot
    serve: it refuses sequence parallelism.

    Args:
        config: Megatron's configuration. ``normalization`` must be ``RMSNorm``.
        hidden_size: Length of the last dimension.
        eps: Added to the mean square.

    Raises:
        BuildError: The configuration asks for another norm, or for a zero-centred weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise BuildError(
                "the torch backend has RMSNorm only",
                field="--normalization",
                value=config.normalization,
                fix="pass --normalization RMSNorm",
            )
        if config.layernorm_zero_centered_gamma:
            raise BuildError(
                "the torch backend stores the norm's weight itself, not its distance from one",
                field="--apply-layernorm-1p",
                fix="leave --apply-layernorm-1p out",
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradient of a weight so marked over the tensor-parallel group:
        # under sequence parallelism each rank saw only its own positions.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ([..., h], any floating dtype); same shape and dtype out."""
        compute = torch.promote_types(x.dtype, torch.float32)
        normed = torch.nn.functional.rms_norm(x.to(compute), self.weight.shape, self.weight.to(compute), self.eps)
        return normed.to(x.dtype)
