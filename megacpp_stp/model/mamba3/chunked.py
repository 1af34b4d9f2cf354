"""Mamba-3's recurrence in chunks: matrix products within a chunk, a state from chunk to chunk.

Exact, not an approximation.  With ``own_t = trap_t dt_t``, ``later_t = (1 - trap_(t+1)) dt_(t+1)`` (0 at the end) and
``L`` the running sum of ``log_decay``, the recurrence of `reference_scan` is::

    h_t q_t = sum over i < t of exp(L_t - L_i) (own_i + later_i) (q_t . k_i) x_i  +  own_t (q_t . k_t) x_t

so all that a step has yet to write with its successor's weight can be written at once, and only the term i = t needs
its own weight.  With several inputs and outputs (MIMO) there is one such sum for each output, over all inputs of each
step; a chunk's products are then of c R rows.

Legend: s sequence, b batch, H heads, P channels of a head, G groups, N state channels, S rotated pairs, R inputs and
outputs of a head at each step, c steps of a chunk, m chunks of a span, l = m c steps of a span.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.reference import rotate_pairs

CHUNK_SIZE = 64
CHUNKS_IN_SPAN = 8


class _Steps(NamedTuple):
    """What differs from step to step; the first dimension is s, padded, or l.  B and C have R, also when it is 1."""

    x: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    log_decay: Tensor
    own: Tensor
    later: Tensor
    dt: Tensor | None
    angle: Tensor | None


class _Weights(NamedTuple):
    """What all steps share; the biases are [H, R, N], the others as in `ScanInputs`."""

    B_bias: Tensor
    C_bias: Tensor
    D: Tensor
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None


class _Carry(NamedTuple):
    """What goes from span to span: the state h [b, H, P, N] and, with rotation, theta [b, H, S]."""

    state: Tensor
    theta: Tensor | None


def chunked_scan(inputs: ScanInputs, *, chunk_size: int = CHUNK_SIZE, chunks_in_span: int = CHUNKS_IN_SPAN) -> Tensor:
    """`reference_scan` in chunks (MIMO: `reference_mimo_scan`), any length, differentiable in every input.

    The chunks of a span run side by side, the spans one after the other.  For the backward pass autograd keeps the
    inputs and the state at the start of each span, and computes a span anew when its turn comes; memory is
    O(s + R l (R c + N + P)) a head.  The state and all arithmetic are in ``inputs.compute_dtype``.

    Args:
        inputs: The recurrence's inputs.
        chunk_size: c. Work grows with it as R (2 R c (N + P) + 4 N P) FLOPs a step and head, forward.
        chunks_in_span: m.

    Returns:
        y, [s, b, H, P], in the dtype of x.
    """
    s, b, H, P = inputs.x.shape
    dtype = inputs.compute_dtype
    steps = _padded(_steps(inputs), (-s) % chunk_size)
    carry = _Carry(
        state=inputs.x.new_zeros(b, H, P, inputs.B.shape[-1], dtype=dtype),
        theta=None if inputs.angle is None else inputs.x.new_zeros(b, H, inputs.angle.shape[-1], dtype=dtype),
    )
    weights = _weights(inputs)
    y = []
    for span in _spans(steps, chunk_size * chunks_in_span):
        out, carry = checkpoint(
            _run_span, span, carry, weights, chunk_size, use_reentrant=False, preserve_rng_state=False
        )
        y.append(out)
    return torch.cat(y)[:s]


def _weights(inputs: ScanInputs) -> _Weights:
    given = (inputs.B_bias, inputs.C_bias, inputs.D, inputs.mimo_x, inputs.mimo_z, inputs.mimo_o)
    weights = _Weights(*(None if weight is None else weight.to(inputs.compute_dtype) for weight in given))
    if inputs.mimo_x is not None:
        return weights
    return weights._replace(B_bias=weights.B_bias.unsqueeze(1), C_bias=weights.C_bias.unsqueeze(1))


def _steps(inputs: ScanInputs) -> _Steps:
    one = inputs.mimo_x is None
    dt, trap = inputs.dt.to(inputs.compute_dtype), inputs.trap.to(inputs.compute_dtype)
    return _Steps(
        x=inputs.x,
        z=inputs.z,
        B=inputs.B.unsqueeze(3) if one else inputs.B,
        C=inputs.C.unsqueeze(3) if one else inputs.C,
        log_decay=inputs.log_decay.to(inputs.compute_dtype),
        own=dt * trap,
        later=_shifted(dt * (1 - trap)),
        dt=None if inputs.angle is None else dt,
        angle=inputs.angle,
    )


def _shifted(values: Tensor) -> Tensor:
    """Each step's successor's value; 0 at the last step."""
    return torch.cat([values[1:], torch.zeros_like(values[:1])])


def _padded(steps: _Steps, extra: int) -> _Steps:
    """With `extra` steps at the end that write nothing, so that the last chunk is full."""
    if extra == 0:
        return steps
    return _Steps(*(t if t is None else pad(t, [0, 0] * (t.dim() - 1) + [0, extra]) for t in steps))


def _spans(steps: _Steps, length: int) -> list[_Steps]:
    # One split a tensor: its backward is one concatenation, where a slice's would fill all of s for each span.
    parts = [None if t is None else t.split(length) for t in steps]
    count = len(steps.x.split(length))
    return [_Steps(*(None if part is None else part[n] for part in parts)) for n in range(count)]


def _run_span(span: _Steps, carry: _Carry, weights: _Weights, chunk_size: int) -> tuple[Tensor, _Carry]:
    """The steps of one span: y [l, b, H, P] in the dtype of x, and what goes on to the next."""
    dtype, rank = carry.state.dtype, span.B.shape[3]
    k, q, theta = _keys_and_queries(span, carry.theta, weights)
    x = span.x.to(dtype).unsqueeze(3)
    if weights.mimo_x is not None:
        x = x * weights.mimo_x
    k, q, x = _by_chunk(k, chunk_size), _by_chunk(q, chunk_size), _by_chunk(x, chunk_size)
    log_decay, own, later = (_by_chunk(t[..., None, None], chunk_size) for t in (span.log_decay, span.own, span.later))
    since_start = log_decay.cumsum(-2)
    until_end = since_start[..., -1:, :] - since_start
    k_written = k * _for_rows(own + later, rank)

    written = x.mT @ (k_written * _for_rows(until_end.exp(), rank))
    starts, state = _state_passing(carry.state, written, since_start[..., -1:, :].exp())
    y = _scores(q, k_written, since_start) @ x + q @ starts.mT * _for_rows(since_start.exp(), rank)
    y = y + _own_step(q, k, x, own) + weights.D.view(-1, 1, 1, 1) * x

    y = y.unflatten(-2, (-1, rank)).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
    z = span.z.to(dtype).unsqueeze(3)
    if weights.mimo_z is not None:
        z = z * weights.mimo_z
    y = y * silu(z)
    y = y.squeeze(3) if weights.mimo_o is None else (y * weights.mimo_o).sum(3)
    return y.to(span.x.dtype), _Carry(state, theta)


def _keys_and_queries(span: _Steps, theta: Tensor | None, weights: _Weights) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and q of every head, [l, b, H, R, N], and theta after the span's last step."""
    k, q = _for_heads(span.B, weights.B_bias), _for_heads(span.C, weights.C_bias)
    if theta is None:
        return k, q, None
    assert span.angle is not None and span.dt is not None
    rates = math.pi * torch.tanh(span.angle.to(k.dtype)).unsqueeze(2)
    thetas = theta + (span.dt.unsqueeze(-1) * rates).cumsum(0)
    turns = thetas.unsqueeze(3)
    # A full turn changes nothing but costs digits as theta grows.
    return rotate_pairs(k, turns), rotate_pairs(q, turns), thetas[-1].remainder(2 * math.pi)


def _for_heads(vectors: Tensor, bias: Tensor) -> Tensor:
    """Each group's vectors handed to its heads, and their bias added: [l, b, G, R, N] to [l, b, H, R, N]."""
    groups = vectors.shape[2]
    return (vectors.to(bias.dtype).unsqueeze(3) + bias.unflatten(0, (groups, -1))).flatten(2, 3)


def _by_chunk(steps: Tensor, chunk_size: int) -> Tensor:
    """[l, b, H, R, n] to [b, H, m, c R, n]."""
    return steps.unflatten(0, (-1, chunk_size)).permute(2, 3, 0, 1, 4, 5).flatten(3, 4)


def _for_rows(steps: Tensor, rank: int) -> Tensor:
    """One number a step for each of its rows: [b, H, m, c, 1] to [b, H, m, c R, 1]."""
    return steps if rank == 1 else steps.repeat_interleave(rank, dim=-2)


def _scores(q: Tensor, k: Tensor, since_start: Tensor) -> Tensor:
    """What each row of a chunk reads of the rows of earlier steps: [b, H, m, c R, c R].

    Args:
        q: [b, H, m, c R, N].
        k: [b, H, m, c R, N].
        since_start: L, [b, H, m, c, 1].
    """
    c = since_start.shape[-2]
    not_before = torch.ones(c, c, dtype=torch.bool, device=q.device).triu()
    decay = (since_start - since_start.mT).masked_fill(not_before, -math.inf).exp()
    scores = q @ k.mT
    if scores.shape[-1] == c:
        return scores * decay
    by_step = scores.unflatten(-1, (c, -1)).unflatten(-3, (c, -1))
    return (by_step * decay[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


def _own_step(q: Tensor, k: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """The term i = t, [b, H, m, c R, P]: every output of a step reads every input of it.

    Args:
        q: [b, H, m, c R, N].
        k: [b, H, m, c R, N].
        x: [b, H, m, c R, P].
        own: [b, H, m, c, 1].
    """
    c = own.shape[-2]
    if q.shape[-2] == c:
        return own * (q * k).sum(-1, keepdim=True) * x
    q, k, x = (rows.unflatten(-2, (c, -1)) for rows in (q, k, x))
    return (own.unsqueeze(-1) * (q @ k.mT) @ x).flatten(-3, -2)


def _state_passing(state: Tensor, written: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of each chunk, [b, H, m, P, N], and at the end of the last.

    Args:
        state: [b, H, P, N] at the start of the first chunk.
        written: [b, H, m, P, N], what each chunk adds to the state at its end.
        decay: [b, H, m, 1, 1] over each chunk.
    """
    starts = []
    for chunk_written, chunk_decay in zip(written.unbind(2), decay.unbind(2), strict=True):
        starts.append(state)
        state = chunk_decay * state + chunk_written
    return torch.stack(starts, dim=2), state
