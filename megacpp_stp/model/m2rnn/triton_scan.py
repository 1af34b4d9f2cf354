"""The M2RNN recurrence as Triton kernels: the state of one head of one sequence stays in one program's registers.

The same function as `megacpp_stp.model.m2rnn.scan`, with the same states kept.  Forward is one launch.  Backward is
two a segment, so that the states computed again, and the heads' shares of the gradients of q and k, which are summed
outside in a fixed order, never take more room than one segment's.

Legend: s sequence, b batch, H heads of this tensor-parallel rank, K key channels and V value channels of a head,
n positions of one segment, N positions between kept states; BK, BV are K, V rounded up to a power of 2, at least 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn.scan import CHECKPOINT_EVERY, check_scan_inputs, segments


def triton_m2rnn_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[Tensor, Tensor]:
    """`megacpp_stp.model.m2rnn.scan.m2rnn_scan` on a GPU: the same arguments, results and kept states, in fp32.

    Raises:
        UserError: What `m2rnn_scan` refuses, fp64, or tensors that are not on a GPU (but under Triton's interpreter).
    """
    check_scan_inputs(query, key, value, log_forget, weight, initial_state, checkpoint_every)
    if torch.float64 in (query.dtype, log_forget.dtype):
        raise UserError("the Triton scan computes in fp32", field="query", value=torch.float64, fix="use m2rnn_scan")
    interpreted = not isinstance(_forward_kernel, triton.JITFunction)
    if not query.is_cuda and not interpreted:
        raise UserError("the Triton scan needs a GPU", field="query", value=query.device.type, fix="use m2rnn_scan")
    return _TritonScan.apply(query, key, value, log_forget, weight, initial_state, checkpoint_every)


class _TritonScan(torch.autograd.Function):
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
        s, b, heads, v_dim = value.shape
        shape = (b, heads, key.shape[-1], v_dim)
        state = value.new_zeros(shape, dtype=torch.float32)
        if initial_state is not None:
            state.copy_(initial_state)
        kept = state.new_empty((max(0, (s - 1) // every), *shape))
        output = _forward(query, key, value, _gates(log_forget), weight, state, kept, every)
        ctx.every = every
        ctx.save_for_backward(query, key, value, log_forget, weight, initial_state, kept)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_forget, weight, initial_state, kept = ctx.saved_tensors
        s, b, heads, v_dim = value.shape
        most, k_dim = min(ctx.every, s), key.shape[-1]
        inputs = (query, key, value, log_forget)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        # Each program carries the gradients of its own state and of its own share of W from segment to segment.
        grad_state = grad_state.to(torch.float32).clone(memory_format=torch.contiguous_format)
        grad_weight = grad_state.new_zeros(b, heads, v_dim, v_dim)
        states = grad_state.new_empty(most, *grad_state.shape)
        grad_query, grad_key = grad_state.new_empty(2, most, b, heads, k_dim)
        for number, at in reversed(list(enumerate(segments(s, ctx.every)))):
            if number > 0:
                states[0] = kept[number - 1]
            elif initial_state is not None:
                states[0] = initial_state
            else:
                states[0].zero_()
            n = at.stop - at.start
            q, k, v, log = (x[at].contiguous() for x in inputs)
            gates = _gates(log)
            _forward(q, k, v, gates, weight, states[0].clone(), states[1:], 1)
            _backward_kernel[(b, heads)](
                q,
                k,
                v,
                gates,
                weight.contiguous(),
                states,
                grad_output[at].contiguous(),
                grad_state,
                grad_weight,
                grad_query,
                grad_key,
                grads[2][at],
                grads[3][at],
                n,
                **_sizes(b, heads, k_dim, v_dim),
            )
            grads[0][at], grads[1][at] = grad_query[:n].sum(dim=2), grad_key[:n].sum(dim=2)
        grad_initial = None if initial_state is None else grad_state.to(initial_state.dtype)
        return (*grads, grad_weight.sum(dim=0).to(weight.dtype), grad_initial, None)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, weight: Tensor, state: Tensor, kept: Tensor, every: int
) -> Tensor:
    """y [n, b, H, V]; ``state`` becomes the last one, ``kept`` those before each ``every``-th position but the first.

    Args:
        query: [n, b, K].
        key: [n, b, K].
        value: [n, b, H, V].
        gates: f and 1 - f, fp32 [n, b, H, 2].
        weight: [H, V, V].
        state: Before the first position, fp32 [b, H, K, V], contiguous.
        kept: fp32 [(n - 1) // every, b, H, K, V] or longer, contiguous.
        every: N.
    """
    n, b, heads, v_dim = value.shape
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    inputs = (x.contiguous() for x in (query, key, value, gates, weight))
    _forward_kernel[(b, heads)](*inputs, state, kept, output, n, every, **_sizes(b, heads, key.shape[-1], v_dim))
    return output


def _gates(log_forget: Tensor) -> Tensor:
    """f and 1 - f, fp32 [s, b, H, 2]: Triton has no expm1 of its own."""
    return torch.stack([log_forget.exp(), -log_forget.expm1()], dim=-1)


def _sizes(b: int, heads: int, k_dim: int, v_dim: int) -> dict[str, int]:
    blocks = {"BK": max(16, triton.next_power_of_2(k_dim)), "BV": max(16, triton.next_power_of_2(v_dim))}
    return {"B": b, "H": heads, "K": k_dim, "V": v_dim, **blocks, "num_warps": 4}


@triton.jit
def _tanh(x):
    """Without the cancellation of (1 - e) / (1 + e) near 0: there its series, to 5e-8 of the value."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    small = tl.exp(-2 * tl.abs(x))
    large = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -large, large))


@triton.jit
def _candidate(state, key, value, weight):
    """Z = tanh(S W + k v^T), in fp32 throughout: TF32 drifts over a sequence."""
    return _tanh(tl.dot(state, weight, input_precision="ieee") + key[:, None] * value[None, :])


@triton.jit
def _vector(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gates_ptr,
    weight_ptr,
    state_ptr,
    kept_ptr,
    out_ptr,
    n,
    every,
    B: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One sequence, one head; see `_forward`."""
    batch, head = tl.program_id(0), tl.program_id(1)
    lane = batch * H + head
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    in_state, in_weight = in_k[:, None] & in_v[None, :], in_v[:, None] & in_v[None, :]
    of_state = (lane * K + ks[:, None]) * V + vs[None, :]
    weight = _vector(weight_ptr + (head * V + vs[:, None]) * V + vs[None, :], in_weight)
    state = tl.load(state_ptr + of_state, mask=in_state, other=0.0)
    # Pointers move from position to position: a product of position and stride could leave 32 bits.
    q_ptr += batch * K + ks
    k_ptr += batch * K + ks
    v_ptr += lane * V + vs
    gates_ptr += lane * 2
    out_ptr += lane * V + vs
    kept_ptr += of_state
    for t in range(n):
        if (t > 0) & (t % every == 0):
            tl.store(kept_ptr, state, mask=in_state)
            kept_ptr += B * H * K * V
        candidate = _candidate(state, _vector(k_ptr, in_k), _vector(v_ptr, in_v), weight)
        state = tl.load(gates_ptr) * state + tl.load(gates_ptr + 1) * candidate
        tl.store(out_ptr, tl.sum(_vector(q_ptr, in_k)[:, None] * state, axis=0), mask=in_v)
        q_ptr += B * K
        k_ptr += B * K
        v_ptr += B * H * V
        gates_ptr += B * H * 2
        out_ptr += B * H * V
    tl.store(state_ptr + of_state, state, mask=in_state)


@triton.jit
def _backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gates_ptr,
    weight_ptr,
    states_ptr,
    grad_out_ptr,
    grad_state_ptr,
    grad_weight_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_log_ptr,
    n,
    B: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One segment of one sequence, one head, from the states before each position.

    The gradient of the state after the segment becomes that of the state before it; that of W is added to.
    """
    batch, head = tl.program_id(0), tl.program_id(1)
    lane = batch * H + head
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    in_state, in_weight = in_k[:, None] & in_v[None, :], in_v[:, None] & in_v[None, :]
    of_state = (lane * K + ks[:, None]) * V + vs[None, :]
    square = vs[:, None] * V + vs[None, :]
    weight = _vector(weight_ptr + head * V * V + square, in_weight)
    grad_state = _vector(grad_state_ptr + of_state, in_state)
    grad_weight = _vector(grad_weight_ptr + lane * V * V + square, in_weight)
    for back in range(n):
        t = n - 1 - back
        row = t * B + batch
        at = t * B * H + lane
        key, value = _vector(k_ptr + row * K + ks, in_k), _vector(v_ptr + at * V + vs, in_v)
        forget, write = tl.load(gates_ptr + at * 2), tl.load(gates_ptr + at * 2 + 1)
        grad_out = _vector(grad_out_ptr + at * V + vs, in_v)
        before = _vector(states_ptr + tl.cast(t, tl.int64) * (B * H * K * V) + of_state, in_state)
        candidate = _candidate(before, key, value, weight)
        after = forget * before + write * candidate
        tl.store(grad_q_ptr + at * K + ks, tl.sum(after * grad_out[None, :], axis=1), mask=in_k)
        grad_state += _vector(q_ptr + row * K + ks, in_k)[:, None] * grad_out[None, :]
        tl.store(grad_log_ptr + at, forget * tl.sum(grad_state * (before - candidate)))
        inner = grad_state * write * (1 - candidate * candidate)
        tl.store(grad_k_ptr + at * K + ks, tl.sum(inner * value[None, :], axis=1), mask=in_k)
        tl.store(grad_v_ptr + at * V + vs, tl.sum(inner * key[:, None], axis=0), mask=in_v)
        grad_weight += tl.dot(tl.trans(before), inner, input_precision="ieee")
        grad_state = forget * grad_state + tl.dot(inner, tl.trans(weight), input_precision="ieee")
    tl.store(grad_state_ptr + of_state, grad_state, mask=in_state)
    tl.store(grad_weight_ptr + lane * V * V + square, grad_weight, mask=in_weight)
