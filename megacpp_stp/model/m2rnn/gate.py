"""The forget gate of M2RNN, as a logarithm.

Legend: s sequence, b batch, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_forget_gate(forget_input: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``log f = -exp(A_log) * softplus(x + dt_bias)``, from which ``f`` and ``1 - f`` both follow without loss.

    A long memory is an f close to 1: bf16 has no number between 0.996 and 1, and fp32's 1 - f from a rounded f keeps
    few digits.  The logarithm keeps them all.

    Args:
        forget_input: x, [s, b, H], any floating dtype.
        a_log: [H].
        dt_bias: [H].

    Returns:
        [s, b, H], at most 0; fp32 (fp64 when x is fp64).
    """
    compute = torch.promote_types(forget_input.dtype, torch.float32)
    # softplus(x) is -logsigmoid(-x); torch's own softplus turns linear above 20.
    negated = -(forget_input.to(compute) + dt_bias.to(compute))
    return a_log.to(compute).exp() * torch.nn.functional.logsigmoid(negated)
