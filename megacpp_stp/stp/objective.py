"""The STP objective: on gathered rows, value and closed-form gradient; on hidden states, a differentiable form.

Letters: B/b batch, T/s sequence, D/h hidden, K spans a sequence, n = K * b triples.
Rows are always ``[3, n, h]``: the states at s, r and t of each triple.

Source of the formula: arXiv 2602.22617, ``1 - cos(h_t - h_r, h_r - h_s)``. Everything is computed in fp32 at
least: in bf16 the cosine alone is quantised to 1/256 near its ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megacpp_stp.stp.cosine import bend, bend_loss, lengths
from megacpp_stp.stp.documents import Spans, checked_documents, triples_of_documents
from megacpp_stp.stp.states import (
    batch_and_length,
    checked_layers,
    compute_dtype,
    gather_rows,
    generator_words,
    only_allowed,
)
from megacpp_stp.stp.windows import checked_window, triples_of_sequence


class StpTerms(NamedTuple):
    """STP of a set of triples.

    Attributes:
        loss: Scalar, the mean of ``1 - cos`` over valid triples; 0 when none is valid.
        valid: Scalar, the number of valid triples, in the loss's dtype.
        grad: ``[3, n, h]``, d loss / d rows.
    """

    loss: Tensor
    valid: Tensor
    grad: Tensor


def _directions(rows: Tensor) -> dict[str, Tensor]:
    """u = h_r - h_s and v = h_t - h_r, each with the longer of its two states."""
    h_s, h_r, h_t = rows
    size_s, size_r, size_t = lengths(rows.detach())
    return {
        "u": h_r - h_s,
        "v": h_t - h_r,
        "size_u": torch.maximum(size_s, size_r),
        "size_v": torch.maximum(size_r, size_t),
    }


@torch.no_grad()
def stp_terms(rows: Tensor, *, tolerance: float, allowed: Tensor | None = None) -> StpTerms:
    """Value and closed-form gradient of the mean STP loss.

    With ``u = h_r - h_s``, ``v = h_t - h_r``: ``g_s = -dL/du``, ``g_t = dL/dv``, ``g_r = -(g_s + g_t)``; the two
    derivatives are in `megacpp_stp.stp.cosine.bend`.

    Args:
        rows: ``[3, n, h]``, fp32 or fp64.
        tolerance: Length of a direction, relative to the longer of its two states, up to which the triple counts
            for nothing; the machine epsilon of the dtype that the states were stored in.
        allowed: ``[n]`` bool; false for triples that count for nothing whatever their states hold, NaN too. None:
            all count.

    Returns:
        StpTerms in the dtype of `rows`. NaN or infinity in an allowed triple makes the loss NaN.
    """
    terms = bend(**_directions(only_allowed(rows, allowed)), tolerance=tolerance)
    grad = torch.stack((-terms.grad_u, terms.grad_u - terms.grad_v, terms.grad_v))
    return StpTerms(terms.loss, terms.valid, grad)


def stp_loss_of_rows(rows: Tensor, *, tolerance: float, allowed: Tensor | None = None) -> Tensor:
    """The loss of `stp_terms` as an ordinary differentiable expression. Arguments as there.

    Returns:
        A scalar in the dtype of `rows`; 0 when no triple is valid.
    """
    return bend_loss(**_directions(only_allowed(rows, allowed)), tolerance=tolerance)


def stp_loss_at(
    hidden: Tensor, triples: Tensor, *, allowed: Tensor | None = None, sequence_first: bool = False
) -> Tensor:
    """The STP loss of hidden states at given triples, differentiable.

    Args:
        hidden: ``(B, T, D)`` floating point, or ``[s, b, h]`` with `sequence_first`; any strides.
        triples: ``[3, K, b]`` int64, positions s < r < t, as `megacpp_stp.stp.sampler` draws them.
        allowed: ``[K, b]`` bool; false for triples that count for nothing. None: all count.
        sequence_first: The layout of `hidden`.

    Returns:
        A scalar, fp32 or fp64.
    """
    rows = gather_rows(hidden, triples, sequence_first=sequence_first)
    return stp_loss_of_rows(rows, tolerance=torch.finfo(hidden.dtype).eps, allowed=allowed)


def compute_stp_loss(
    hidden: Tensor | Sequence[Tensor],
    *,
    n_spans: int,
    generator: torch.Generator | None = None,
    max_span: int | None = None,
    documents: Tensor | None = None,
    sequence_first: bool = False,
) -> Tensor:
    """The STP loss of hidden states, differentiable.

    Variant A: one tensor, ``n_spans=1``. Variant B: one tensor, more spans. Variant C: a list of tensors, one for
    each supervised layer; the result is the mean over the list, each layer with triples of its own.

    Args:
        hidden: ``(B, T, D)`` floating point, or a non-empty list of such; any strides. Rows are gathered first and
            only those are computed with, in fp32 (fp64 stays fp64).
        n_spans: Triples a sequence.
        generator: Draws the triples; torch's default generator when None.
        max_span: The largest t - s of a triple, at least 2; None for no limit.
        documents: ``[b, s]`` integers, batch first in either layout: neighbours of equal number are one document,
            negative is padding. No triple leaves its document or touches padding. None: each sequence is one.
        sequence_first: The tensors are in Megatron's layout, ``[s, b, h]``.

    Returns:
        A scalar in [0, 2], fp32 or fp64. Exactly 0, without a gradient, when T < 3: there is no triple. Exactly 0,
        with a gradient of 0, when no triple is allowed or none has a direction. NaN or infinity in a sampled row
        gives NaN, and in any other row nothing.

    Raises:
        UserError: An empty list, ``n_spans < 1``, ``max_span < 2``, documents of another shape, or a tensor that
            is not three-dimensional floating point. A list that nobody filled must not read as a perfect loss.
    """
    losses = []
    for layer in checked_layers(hidden, n_spans=n_spans):
        batch, length = batch_and_length(layer, sequence_first=sequence_first)
        checked_window(length, max_span)
        if documents is not None:
            checked_documents(documents, batch=batch, length=length)
        if length < 3:
            losses.append(torch.zeros((), dtype=compute_dtype(layer.dtype), device=layer.device))
            continue
        words = generator_words(4, n_spans=n_spans, batch=batch, generator=generator, device=layer.device)
        triples, allowed = _triples(words, length=length, max_span=max_span, documents=documents)
        losses.append(stp_loss_at(layer, triples, allowed=allowed, sequence_first=sequence_first))
    return torch.stack(losses).mean()


def _triples(
    words: Tensor, *, length: int, max_span: int | None, documents: Tensor | None
) -> Spans | tuple[Tensor, None]:
    if documents is None:
        return triples_of_sequence(words, length=length, max_span=max_span), None
    return triples_of_documents(words, documents, max_span=max_span)
