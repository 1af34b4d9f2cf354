"""Mamba-3's recurrence in chunks: matrix products within a chunk, a state from chunk to chunk.

Exact, not an approximation.  With ``own_t = trap_t dt_t``, ``later_t = (1 - trap_(t+1)) dt_(t+1)`` (0 at the end) and
``L`` the running sum of ``log_decay``, the recurrence of `reference_scan` is::

    h_t q_t = sum over i < t of exp(L_t - L_i) (own_i + later_i) (q_t . k_i) x_i  +  own_t (q_t . k_t) x_t

so all that a step has yet to write with its successor's weight can be written at once, and only the term i = t needs
its own weight.

Legend: s sequence, b batch, H heads, P channels of a head, G groups, N state channels, S rotated pairs, c steps of a
chunk, m chunks of a span, l = m c steps of a span.
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
    """What differs from step to step; the first dimension is s, padded, or l."""

    x: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    log_decay: Tensor
    own: Tensor
    later: Tensor
    dt: Tensor | None
    angle: Tensor | None


class _Carry(NamedTuple):
    """What goes from span to span: the state h [b, H, P, N] and, with rotation, theta [b, H, S]."""

    state: Tensor
    theta: Tensor | None


def chunked_scan(inputs: ScanInputs, *, chunk_size: int = CHUNK_SIZE, chunks_in_span: int = CHUNKS_IN_SPAN) -> Tensor:
    """`reference_scan` in chunks, any length, differentiable in every input.

    The chunks of a span run side by side, the spans one after the other.  For the backward pass autograd keeps the
    inputs and the state at the start of each span, and computes a span anew when its turn comes; memory is
    O(s + l (c + N + P)) a head.  The state and all arithmetic are in ``inputs.compute_dtype``.

    Args:
        inputs: The recurrence's inputs.
        chunk_size: c. Work grows with it as 2 c (N + P) + 4 N P FLOPs a step and head, forward.
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
    weights = tuple(weight.to(dtype) for weight in (inputs.B_bias, inputs.C_bias, inputs.D))
    y = []
    for span in _spans(steps, chunk_size * chunks_in_span):
        out, carry = checkpoint(
            _run_span, span, carry, weights, chunk_size, use_reentrant=False, preserve_rng_state=False
        )
        y.append(out)
    return torch.cat(y)[:s]


def _steps(inputs: ScanInputs) -> _Steps:
    dt, trap = inputs.dt.to(inputs.compute_dtype), inputs.trap.to(inputs.compute_dtype)
    return _Steps(
        x=inputs.x,
        z=inputs.z,
        B=inputs.B,
        C=inputs.C,
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


def _run_span(
    span: _Steps, carry: _Carry, weights: tuple[Tensor, Tensor, Tensor], chunk_size: int
) -> tuple[Tensor, _Carry]:
    """The steps of one span: y [l, b, H, P] in the dtype of x, and what goes on to the next."""
    dtype = carry.state.dtype
    B_bias, C_bias, D = weights
    k, q, theta = _keys_and_queries(span, carry.theta, B_bias, C_bias)
    k, q = _by_chunk(k, chunk_size), _by_chunk(q, chunk_size)
    x = _by_chunk(span.x.to(dtype), chunk_size)
    log_decay, own, later = (_by_chunk(t.unsqueeze(-1), chunk_size) for t in (span.log_decay, span.own, span.later))
    since_start = log_decay.cumsum(-2)
    until_end = since_start[..., -1:, :] - since_start
    k_written = k * (own + later)

    written = x.mT @ (k_written * until_end.exp())
    starts, state = _state_passing(carry.state, written, since_start[..., -1:, :].exp())
    diagonal = own * (q * k).sum(-1, keepdim=True) + D.view(-1, 1, 1, 1)
    y = (q @ k_written.mT * _decay_between(since_start)) @ x + diagonal * x + q @ starts.mT * since_start.exp()

    y = y.permute(2, 3, 0, 1, 4).flatten(0, 1)
    return (y * silu(span.z.to(dtype))).to(span.x.dtype), _Carry(state, theta)


def _keys_and_queries(
    span: _Steps, theta: Tensor | None, B_bias: Tensor, C_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and q of every head, [l, b, H, N], and theta after the span's last step."""
    k, q = _for_heads(span.B, B_bias), _for_heads(span.C, C_bias)
    if theta is None:
        return k, q, None
    assert span.angle is not None and span.dt is not None
    rates = math.pi * torch.tanh(span.angle.to(k.dtype)).unsqueeze(2)
    thetas = theta + (span.dt.unsqueeze(-1) * rates).cumsum(0)
    # A full turn changes nothing but costs digits as theta grows.
    return rotate_pairs(k, thetas), rotate_pairs(q, thetas), thetas[-1].remainder(2 * math.pi)


def _for_heads(vectors: Tensor, bias: Tensor) -> Tensor:
    """Each group's vector handed to its heads, and their bias added: [l, b, G, N] to [l, b, H, N]."""
    groups = vectors.shape[2]
    return (vectors.to(bias.dtype).unsqueeze(3) + bias.unflatten(0, (groups, -1))).flatten(2, 3)


def _by_chunk(steps: Tensor, chunk_size: int) -> Tensor:
    """[l, b, H, n] to [b, H, m, c, n]."""
    return steps.unflatten(0, (-1, chunk_size)).permute(2, 3, 0, 1, 4)


def _decay_between(since_start: Tensor) -> Tensor:
    """``exp(L_t - L_i)`` at [..., t, i] for i < t, else 0: [b, H, m, c, 1] to [b, H, m, c, c]."""
    c = since_start.shape[-2]
    not_before = torch.ones(c, c, dtype=torch.bool, device=since_start.device).triu()
    return (since_start - since_start.mT).masked_fill(not_before, -math.inf).exp()


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
