"""The M2RNN recurrence for training: few states kept, the others computed again in backward.

Legend: s sequence, b batch, H heads of this tensor-parallel rank, K key channels and V value channels of a head,
n positions of one segment, N positions between kept states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.errors import UserError

CHECKPOINT_EVERY = 64
"""Default of N: at K = 64, V = 16 the kept states are then about as large as v and y together."""


def m2rnn_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[Tensor, Tensor]:
    """`megacpp_stp.model.m2rnn.reference.reference_scan`, with bounded memory.

    All arithmetic and every state is fp32 (fp64 when the query is fp64), whatever the inputs' dtype; so is the sum of
    a gradient over positions.  Autograd keeps the inputs and one state in N positions, ``b * (s / N) * H * K * V``
    numbers; backward holds two segments of n states more while it runs.  Matrix products follow torch's setting for
    TF32, which is off by default; with it on, states drift.

    Args:
        query: [s, b, K].
        key: [s, b, K].
        value: [s, b, H, V].
        log_forget: Logarithm of the forget gate, [s, b, H], at most 0, fp32 or fp64.
        weight: [H, V, V].
        initial_state: [b, H, K, V]; zero when None.
        checkpoint_every: N.

    Returns:
        y [s, b, H, V] in the dtype of ``value``, and the last state [b, H, K, V] in fp32 (fp64).

    Raises:
        UserError: A shape does not fit, ``log_forget`` is a 16-bit number, or N is not positive.
    """
    check_scan_inputs(query, key, value, log_forget, weight, initial_state, checkpoint_every)
    return _Scan.apply(query, key, value, log_forget, weight, initial_state, checkpoint_every)


def check_scan_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    checkpoint_every: int,
) -> None:
    """Refuse what `m2rnn_scan` and its Triton twin cannot compute; see there."""
    s, b, heads, v_dim = value.shape
    k_dim = key.shape[-1]
    expected = {
        "query": (query, (s, b, k_dim)),
        "key": (key, (s, b, k_dim)),
        "log_forget": (log_forget, (s, b, heads)),
        "weight": (weight, (heads, v_dim, v_dim)),
        "initial_state": (initial_state, (b, heads, k_dim, v_dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"must be of shape {shape}, as value and key are", field=name, value=tuple(tensor.shape))
    if log_forget.dtype not in (torch.float32, torch.float64):
        raise UserError("must be fp32 or fp64: a 16-bit gate forgets", field="log_forget", value=log_forget.dtype)
    if checkpoint_every < 1:
        raise UserError("must be at least 1", field="checkpoint_every", value=checkpoint_every)


def segments(s: int, every: int) -> Iterator[slice]:
    """Positions 0 to s in runs of ``every``, the last one maybe shorter."""
    for start in range(0, s, every):
        yield slice(start, min(start + every, s))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_forget: Tensor,
        weight: Tensor,
        initial_state: Tensor | None,
        every: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        s, b, heads, v_dim = value.shape
        shape = (b, heads, key.shape[-1], v_dim)
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        state = query.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        # The state before each segment but the first, whose is the initial state.
        kept = query.new_empty((max(0, (s - 1) // every), *shape), dtype=dtype)
        weights = _weight_of_batch(weight, b, dtype)
        states = query.new_empty((min(every, s) + 1, *shape), dtype=dtype)
        for number, at in enumerate(segments(s, every)):
            if number > 0:
                kept[number - 1] = state
            states[0] = state
            _advance(states, None, key[at].to(dtype), value[at].to(dtype), log_forget[at].to(dtype), weights)
            n = at.stop - at.start
            output[at] = (query[at].to(dtype)[:, :, None, None, :] @ states[1 : n + 1]).squeeze(-2)
            state = states[n]
        ctx.every = every
        ctx.save_for_backward(query, key, value, log_forget, weight, initial_state, kept)
        # A copy, so that one state does not hold a segment of them in memory.
        return output, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_forget, weight, initial_state, kept = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        s, b, heads, v_dim = value.shape
        shape = (b, heads, key.shape[-1], v_dim)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, log_forget)]
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        weights = _weight_of_batch(weight, b, dtype)
        grad_state = grad_state.to(dtype)
        states = query.new_empty((min(ctx.every, s) + 1, *shape), dtype=dtype)
        candidates = query.new_empty((min(ctx.every, s), *shape), dtype=dtype)
        for number, at in reversed(list(enumerate(segments(s, ctx.every)))):
            if number > 0:
                states[0] = kept[number - 1]
            elif initial_state is not None:
                states[0] = initial_state
            else:
                states[0].zero_()
            grad_state = _segment_backward(
                inputs=[x[at].to(dtype) for x in (query, key, value, log_forget)],
                grads=[grad[at] for grad in grads],
                grad_weight=grad_weight,
                grad_output=grad_output[at].to(dtype),
                grad_state=grad_state,
                weights=weights,
                states=states[: at.stop - at.start + 1],
                candidates=candidates[: at.stop - at.start],
            )
        grad_initial = None if initial_state is None else grad_state.to(initial_state.dtype)
        return (*grads, grad_weight.to(weight.dtype), grad_initial, None)


def _weight_of_batch(weight: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """[H, V, V] to [b * H, V, V], which a batched product wants."""
    return weight.to(dtype).expand(b, *weight.shape).reshape(-1, *weight.shape[1:])


def _advance(
    states: Tensor, candidates: Tensor | None, key: Tensor, value: Tensor, log_forget: Tensor, weights: Tensor
) -> None:
    """Fill ``states[1:]`` from ``states[0]``, and the candidates Z when wanted.

    Args:
        states: At least [n + 1, b, H, K, V].
        candidates: [n, b, H, K, V] or None.
        key: [n, b, K].
        value: [n, b, H, V].
        log_forget: [n, b, H].
        weights: [b * H, V, V].
    """
    forget = log_forget.exp()[..., None, None]
    write = log_forget.expm1().neg_()[..., None, None]
    for t in range(key.shape[0]):
        outer = key[t][:, None, :, None] * value[t][:, :, None, :]
        candidate = torch.baddbmm(outer.flatten(0, 1), states[t].flatten(0, 1), weights).view_as(outer).tanh_()
        torch.mul(states[t], forget[t], out=states[t + 1])
        states[t + 1].addcmul_(candidate, write[t])
        if candidates is not None:
            candidates[t] = candidate


def _segment_backward(
    *,
    inputs: list[Tensor],
    grads: list[Tensor],
    grad_weight: Tensor,
    grad_output: Tensor,
    grad_state: Tensor,
    weights: Tensor,
    states: Tensor,
    candidates: Tensor,
) -> Tensor:
    """Backward through one segment.

    Args:
        inputs: Query, key, value and log of the forget gate of the segment.
        grads: Where their gradients go.
        grad_weight: [H, V, V], added to.
        grad_output: [n, b, H, V].
        grad_state: Of the state after the segment, [b, H, K, V].
        weights: [b * H, V, V].
        states: [n + 1, b, H, K, V]; the first is the state before the segment, the others are computed.
        candidates: [n, b, H, K, V], overwritten: Z, then the gradient of what tanh was taken of.

    Returns:
        Gradient of the state before the segment, [b, H, K, V].
    """
    query, key, value, log_forget = inputs
    _advance(states, candidates, key, value, log_forget, weights)
    forget = log_forget.exp()
    write = log_forget.expm1().neg_()[..., None, None]
    transposed = weights.transpose(1, 2)
    grads[0].copy_((states[1:] @ grad_output[..., None]).squeeze(-1).sum(dim=2))
    for t in reversed(range(key.shape[0])):
        candidate = candidates[t]
        grad_state = torch.addcmul(grad_state, query[t][:, None, :, None], grad_output[t][:, :, None, :])
        grads[3][t] = (grad_state * (states[t] - candidate)).sum(dim=(-2, -1)) * forget[t]
        inner = candidate.square().neg_().add_(1).mul_(grad_state).mul_(write[t])
        candidates[t] = inner
        carried = (grad_state * forget[t][..., None, None]).flatten(0, 1)
        grad_state = torch.baddbmm(carried, inner.flatten(0, 1), transposed).view_as(inner)
    grads[1].copy_((candidates @ value[..., None]).squeeze(-1).sum(dim=2))
    grads[2].copy_((key[:, :, None, None, :] @ candidates).squeeze(-2))
    grad_weight.add_((states[:-1].transpose(-2, -1) @ candidates).sum(dim=(0, 1)))
    return grad_state
