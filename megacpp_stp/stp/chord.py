"""The chord objective: a piece of the path against all that lies before and after it. Another quantity than STP's.

Letters: B/b batch, T/s sequence, D/h hidden, K spans a sequence, n = K * b patches.
Rows are always ``[4, n, h]``: the states at a, s, r and e, with positions a <= s < r <= e.

The path runs from a to e, a patch of it from s to r:

    L = 1 - cos(h_r - h_s, (h_s - h_a) + (h_e - h_r))

Source: the code published with arXiv 2602.22617 (galilai-group/llm-jepa, ``stp.py``: ``before + after`` against
``patch``). The paper displays the triple form of `megacpp_stp.stp.objective`; the two agree where s = a or r = e and
nowhere else. Independent points give 1 + 1/sqrt(2) here while s and r are off the ends, a random walk 1.

Two things differ from that code. It takes a conversation's user and assistant parts and leaves out what is between;
here the path is a whole sequence or document. It draws s, then r after it, so short patches near the end are
likelier; here all patches but the whole path are equally likely (its ``uniform`` mode).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megacpp_stp.stp.cosine import bend, bend_loss, lengths
from megacpp_stp.stp.documents import Spans, checked_documents, choose_start, neighbours
from megacpp_stp.stp.states import (
    batch_and_length,
    checked_layers,
    compute_dtype,
    gather_rows,
    generator_words,
    only_allowed,
)


class ChordTerms(NamedTuple):
    """The chord objective of a set of patches.

    Attributes:
        loss: Scalar, the mean of ``1 - cos`` over valid patches; 0 when none is valid.
        valid: Scalar, the number of valid patches, in the loss's dtype.
        grad: ``[4, n, h]``, d loss / d rows.
    """

    loss: Tensor
    valid: Tensor
    grad: Tensor


def _directions(rows: Tensor) -> dict[str, Tensor]:
    """The patch u = h_r - h_s, and w = (h_s - h_a) + (h_e - h_r), each with the longest of its states."""
    h_a, h_s, h_r, h_e = rows
    size_a, size_s, size_r, size_e = lengths(rows.detach())
    size_patch = torch.maximum(size_s, size_r)
    return {
        "u": h_r - h_s,
        "v": (h_s - h_a) + (h_e - h_r),
        "size_u": size_patch,
        "size_v": torch.maximum(size_patch, torch.maximum(size_a, size_e)),
    }


@torch.no_grad()
def chord_terms(rows: Tensor, *, tolerance: float, allowed: Tensor | None = None) -> ChordTerms:
    """Value and closed-form gradient of the mean chord objective.

    With the patch u and w as above: ``g_a = -dL/dw``, ``g_s = dL/dw - dL/du``, ``g_r = dL/du - dL/dw``,
    ``g_e = dL/dw``; the two derivatives are in `megacpp_stp.stp.cosine.bend`.

    Args:
        rows: ``[4, n, h]``, fp32 or fp64.
        tolerance: Length of a direction, relative to the longest of its states, up to which the patch counts for
            nothing; the machine epsilon of the dtype that the states were stored in.
        allowed: ``[n]`` bool; false for patches that count for nothing whatever their states hold. None: all count.

    Returns:
        ChordTerms in the dtype of `rows`. NaN or infinity in an allowed patch makes the loss NaN.
    """
    terms = bend(**_directions(only_allowed(rows, allowed)), tolerance=tolerance)
    inner = terms.grad_u - terms.grad_v
    return ChordTerms(terms.loss, terms.valid, torch.stack((-terms.grad_v, -inner, inner, terms.grad_v)))


def chord_loss_of_rows(rows: Tensor, *, tolerance: float, allowed: Tensor | None = None) -> Tensor:
    """The loss of `chord_terms` as an ordinary differentiable expression. Arguments as there."""
    return bend_loss(**_directions(only_allowed(rows, allowed)), tolerance=tolerance)


def patches_of_sequence(words: Tensor, *, length: int) -> Tensor:
    """Patches of the path from the first to the last position, uniform over all but the whole path.

    A cyclic step of 1 to T - 1 from any position names a pair of positions, each pair twice: T (T - 1) draws. The
    two that name the pair of the ends are skipped.

    Args:
        words: ``[>= 1, K, b]`` int64, random words.
        length: T, at least 3.

    Returns:
        ``[4, K, b]`` int64: a = 0, s, r, e = T - 1.
    """
    assert length >= 3, length
    draw = words[0] % (length * (length - 1) - 2)
    draw = draw + (draw >= length - 1)  # one step from the last position
    draw = draw + (draw >= (length - 2) * length)  # T - 1 steps from the first
    one = draw % length
    other = (one + draw // length + 1) % length
    s, r = torch.minimum(one, other), torch.maximum(one, other)
    return torch.stack((torch.zeros_like(s), s, r, torch.full_like(s, length - 1)))


def patches_of_documents(words: Tensor, documents: Tensor) -> Spans:
    """Patches of the paths of all documents, uniform over all of the sequence but the whole paths.

    Args:
        words: ``[>= 3, K, b]`` int64, random words.
        documents: ``[b, s]`` integers, see `megacpp_stp.stp.documents`.

    Returns:
        Spans of four positions: the document's first, s, r, the document's last.
    """
    length = documents.shape[1]
    before, after = neighbours(documents)
    ends = (after - (before == 0).to(after.dtype)).clamp(min=0)
    start, choice, allowed = choose_start(ends, words[:2], bound=length * (length - 1) // 2)
    place = start.t()
    first, last = start - before.gather(1, place).t(), start + after.gather(1, place).t()
    positions = torch.stack((first, start, start + 1 + words[2] % choice.clamp(min=1), last))
    return Spans(torch.where(allowed, positions, torch.zeros_like(positions)), allowed)


def compute_chord_loss(
    hidden: Tensor | Sequence[Tensor],
    *,
    n_spans: int,
    generator: torch.Generator | None = None,
    documents: Tensor | None = None,
    sequence_first: bool = False,
) -> Tensor:
    """The chord objective of hidden states, differentiable; see the top of this module.

    Args:
        hidden: ``(B, T, D)`` floating point, or a non-empty list of such, whose losses are averaged.
        n_spans: Patches a sequence.
        generator: Draws the patches; torch's default generator when None.
        documents: ``[b, s]`` integers; each document is then a path of its own. None: each sequence is one path.
        sequence_first: The tensors are in Megatron's layout, ``[s, b, h]``.

    Returns:
        A scalar in [0, 2], fp32 or fp64. What gives 0 and what NaN: as `megacpp_stp.stp.compute_stp_loss`.

    Raises:
        UserError: As `megacpp_stp.stp.compute_stp_loss`.
    """
    losses = []
    for layer in checked_layers(hidden, n_spans=n_spans):
        batch, length = batch_and_length(layer, sequence_first=sequence_first)
        if documents is not None:
            checked_documents(documents, batch=batch, length=length)
        if length < 3:
            losses.append(torch.zeros((), dtype=compute_dtype(layer.dtype), device=layer.device))
            continue
        words = generator_words(3, n_spans=n_spans, batch=batch, generator=generator, device=layer.device)
        if documents is None:
            patches, allowed = patches_of_sequence(words, length=length), None
        else:
            patches, allowed = patches_of_documents(words, documents)
        rows = gather_rows(layer, patches, sequence_first=sequence_first)
        tolerance = torch.finfo(layer.dtype).eps
        losses.append(chord_loss_of_rows(rows, tolerance=tolerance, allowed=allowed))
    return torch.stack(losses).mean()
