"""What follows the M2RNN recurrence: the residual of v, the output gate and the norm over all heads.

Legend: s sequence, b batch, c output channels of this tensor-parallel rank (its heads times V).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def gated_norm(
    y: Tensor,
    value: Tensor,
    gate: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group: ProcessGroup | None = None,
) -> Tensor:
    """``u = (y + D v) silu(g)``; ``u / sqrt(mean(u^2) + eps) * weight``.

    The mean is over the channels of all ranks of ``group``: one fp32 number a token is summed over them in forward
    and another in backward, so that the cut over ranks changes nothing.  Computed in fp32 (fp64 when y is fp64) and
    rounded once.  Autograd keeps the inputs and that one number; the rest is computed again.

    Args:
        y: [s, b, c]; so are ``value`` and ``gate``.
        value: v.
        gate: g.
        residual: D, [c].
        weight: [c].
        eps: Added to the mean square.
        group: Tensor-parallel group, over which the channels are cut evenly; None when they are whole.

    Returns:
        [s, b, c], in the dtype of y.
    """
    return _GatedNorm.apply(y, value, gate, residual, weight, eps, group)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        value: Tensor,
        gate: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        gated = _summed(y, value, residual, dtype) * torch.nn.functional.silu(gate.to(dtype))
        inverse = torch.rsqrt(_mean(gated.square(), group) + eps)
        ctx.group = group
        ctx.save_for_backward(y, value, gate, residual, weight, inverse)
        return (gated * inverse * weight.to(dtype)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        y, value, gate, residual, weight, inverse = ctx.saved_tensors
        dtype = inverse.dtype
        summed = _summed(y, value, residual, dtype)
        sigmoid = torch.sigmoid(gate.to(dtype))
        silu = sigmoid * gate.to(dtype)
        normed = summed * silu * inverse
        grad_output = grad_output.to(dtype)
        grad_normed = grad_output * weight.to(dtype)
        grad_gated = inverse * (grad_normed - normed * _mean(grad_normed * normed, ctx.group))
        grad_summed = grad_gated * silu
        grad_gate = grad_gated * summed * sigmoid * (1 + gate.to(dtype) - silu)
        tokens = tuple(range(y.dim() - 1))
        return (
            grad_summed.to(y.dtype),
            (grad_summed * residual.to(dtype)).to(value.dtype),
            grad_gate.to(gate.dtype),
            (grad_summed * value.to(dtype)).sum(dim=tokens).to(residual.dtype),
            (grad_output * normed).sum(dim=tokens).to(weight.dtype),
            None,
            None,
        )


def _summed(y: Tensor, value: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(y.to(dtype), residual.to(dtype), value.to(dtype))


def _mean(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean of [s, b, c] over the channels of all ranks: [s, b, 1]."""
    if group is None or group.size() == 1:
        return x.mean(dim=-1, keepdim=True)
    total = x.sum(dim=-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return total / (x.shape[-1] * group.size())
