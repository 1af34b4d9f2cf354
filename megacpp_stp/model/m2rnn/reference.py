"""The M2RNN block as its formulas read, one position after the other: what the tests hold the fast code to.

Formulas: Mishra, Tan, Stoica, Gonzalez, Dao, "M2RNN: Non-Linear RNNs with Matrix-Valued States for Scalable Language
Modeling", arXiv 2603.14360; the recurrence as in the authors' XMA (xma/layers/m2rnn/torch_implementation.py of
open-lm-engine/accelerated-model-architectures), the gates, the residual and the norm around it as in their training
code (sequence_mixer_blocks/m2rnn.py of open-lm-engine/lm-engine).

Legend: s sequence, b batch, H heads, K key channels and V value channels of a head, C convolved channels, c taps of
the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_scan(
    query: Tensor, key: Tensor, value: Tensor, log_forget: Tensor, weight: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence.

    ``Z_t = tanh(S_{t-1} W + k_t v_t^T)``, ``S_t = f_t S_{t-1} + (1 - f_t) Z_t``, ``y_t = S_t^T q_t`` with
    ``f_t = exp(log_forget_t)``; W multiplies from the right, one a head; q and k are shared by the heads.

    Args:
        query: [s, b, K].
        key: [s, b, K].
        value: [s, b, H, V].
        log_forget: [s, b, H], at most 0.
        weight: [H, V, V].
        initial_state: [b, H, K, V]; zero when None.

    Returns:
        y [s, b, H, V] and the last state [b, H, K, V], in the dtype of the inputs.
    """
    s, b, heads, _ = value.shape
    state = query.new_zeros(b, heads, key.shape[-1], value.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(s):
        outer = torch.einsum("bk,bhv->bhkv", key[t], value[t])
        candidate = torch.tanh(torch.einsum("bhkv,hvw->bhkw", state, weight) + outer)
        forget = log_forget[t].exp()[..., None, None]
        state = forget * state - log_forget[t].expm1()[..., None, None] * candidate
        outputs.append(torch.einsum("bk,bhkv->bhv", query[t], state))
    return torch.stack(outputs), state


def reference_log_forget(forget_input: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``log f = -exp(A_log) * softplus(x + dt_bias)``.

    Args:
        forget_input: x, [s, b, H].
        a_log: [H].
        dt_bias: [H].

    Returns:
        [s, b, H], at most 0.
    """
    return -a_log.exp() * torch.log1p(torch.exp(forget_input + dt_bias))


def reference_causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu(bias + sum_j weight_j x_{t - c + 1 + j})`` in each channel; positions before the first are zero.

    Args:
        x: [s, b, C].
        weight: [C, 1, c].
        bias: [C].

    Returns:
        [s, b, C].
    """
    taps = weight.shape[-1]
    outputs = []
    for t in range(x.shape[0]):
        out = bias.expand(x.shape[1:])
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                out = out + weight[:, 0, j] * x[t - taps + 1 + j]
        outputs.append(out * torch.sigmoid(out))
    return torch.stack(outputs)


def reference_gated_norm(
    y: Tensor, value: Tensor, gate: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> Tensor:
    """``u = (y + D v) silu(g)``; ``u / sqrt(mean(u^2) + eps) * weight``, the mean over all heads together.

    Args:
        y: [s, b, H * V]; so are ``value`` and ``gate``.
        value: v.
        gate: g.
        residual: D, [H * V].
        weight: [H * V].
        eps: Added to the mean square.

    Returns:
        [s, b, H * V].
    """
    gated = (y + residual * value) * gate * torch.sigmoid(gate)
    return gated / torch.sqrt(gated.square().mean(dim=-1, keepdim=True) + eps) * weight
