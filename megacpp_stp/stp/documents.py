"""Triples inside the documents of packed sequences: no host synchronisation, static shapes, integers alone.

Letters: b batch, s sequence (T its length), W window (the largest t - s), K spans a sequence.

``documents [b, s]`` holds integers: neighbours of equal number are of one document, a negative number is padding.
Megatron's data tensors are ``[b, s]`` too, other than its hidden states.

The draw goes by the first position: of the m positions that may follow it (same document, inside the window),
C(m, 2) pairs make a triple with it. A running sum of these counts, and a draw below its end, choose the first
position; two of its m followers are the rest. The counts fit int64 for any sequence up to 2**21 positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.stp.windows import checked_window, count_triples, sorted_pair

_MAX_LENGTH = 2**21
_WORD_BITS = 62
# The draw below the running sum has this many bits more than the sum: its bias is 2**-40, relative.
_SPARE_BITS = 40


class Spans(NamedTuple):
    """Sampled positions.

    Attributes:
        positions: ``[m, K, b]`` int64, rising along m (not strictly for a chord's ends); all 0 where not allowed.
        allowed: ``[K, b]`` bool; false throughout a sequence that has nothing to draw from.
    """

    positions: Tensor
    allowed: Tensor


def documents_of_starts(starts: Tensor) -> Tensor:
    """Document numbers from ``[b, s]`` bool, true at each document's first position (position id 0, say)."""
    return starts.cumsum(1, dtype=torch.int64)


def documents_of_tokens(tokens: Tensor, *, end_of_document: int) -> Tensor:
    """Document numbers from token ids ``[b, s]``; the token `end_of_document` is the last of its document."""
    ends = (tokens == end_of_document).to(torch.int64)
    return ends.cumsum(1) - ends


def without_padding(documents: Tensor, padding: Tensor) -> Tensor:
    """`documents` with a negative number wherever `padding` (``[b, s]`` bool) is true."""
    return torch.where(padding, torch.full_like(documents, -1), documents)


def checked_documents(documents: Tensor, *, batch: int, length: int) -> Tensor:
    """`documents` if it can go with hidden states of `batch` sequences of `length` positions.

    Raises:
        UserError: Another shape, no integers, or more than 2**21 positions.
    """
    if tuple(documents.shape) != (batch, length) or documents.is_floating_point() or documents.dtype == torch.bool:
        raise UserError(
            f"are not integers [b, s] = [{batch}, {length}]",
            field="documents",
            value=f"{tuple(documents.shape)} {documents.dtype}",
            fix="number the documents of each sequence, batch first, whatever the layout of the hidden states",
        )
    if length > _MAX_LENGTH:
        raise UserError("counts of triples would leave int64", field="documents", value=length, fix="shorten to 2**21")
    return documents


def neighbours(documents: Tensor) -> tuple[Tensor, Tensor]:
    """For each position, how many earlier and how many later ones its document has: ``[b, s]`` int64, 0 in padding."""
    batch, length = documents.shape
    changes = (documents[:, 1:] != documents[:, :-1]).to(torch.int64)
    run = torch.nn.functional.pad(changes, (1, 0)).cumsum(1)
    nothing = torch.zeros_like(run)
    # Sums alone: torch_xla 2.9 has no search, and its running maximum does not compile.
    size = nothing.scatter_add(1, run, torch.ones_like(run))
    end, size = size.cumsum(1).gather(1, run), size.gather(1, run)
    position = torch.arange(length, device=documents.device)
    before, after = position - (end - size), end - 1 - position
    padding = documents < 0
    return torch.where(padding, nothing, before), torch.where(padding, nothing, after)


def below(size: Tensor, words: Tensor, *, bound: int) -> Tensor:
    """Random integers below `size`, uniform to 2**-40 relative.

    Args:
        size: int64, from 1 to `bound`; broadcasts with the words.
        words: ``[2, ...]`` int64, random words of 62 bits or more.
        bound: A Python integer of at most 61 bits: how often to reduce is known without looking at `size`.
    """
    bits = bound.bit_length()
    step = _WORD_BITS - bits
    assert step > 0, bound
    value, spare = words[0] % size, words[1]
    # Long division: the number words[0] * 2**(steps * step) + ... modulo size, without leaving int64.
    for _ in range(-(-max(0, bits + _SPARE_BITS - _WORD_BITS) // step)):
        value = ((value << step) | (spare & ((1 << step) - 1))) % size
        spare = spare >> step
    return value


def choose_start(weights: Tensor, words: Tensor, *, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """First positions, each as likely as its weight.

    Args:
        weights: ``[b, s]`` int64, not negative.
        words: ``[2, K, b]`` random words.
        bound: At least the sum of any sequence's weights.

    Returns:
        The position ``[K, b]``, the weight there, and whether the sequence has any weight ``[K, b]``.
    """
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1]
    allowed = (total > 0).expand(words.shape[1:])
    pick = below(total.clamp(min=1), words, bound=max(bound, 1))
    # The sums that the draw has passed, counted rather than searched for (see `neighbours`): b * s * K truth values
    # are little. Without any weight all are passed; take any position.
    passed = (cumulative.unsqueeze(2) <= pick.t().unsqueeze(1)).sum(1)
    start = passed.clamp(max=weights.shape[1] - 1)
    return start.t(), weights.gather(1, start).t(), allowed


def triples_of_documents(words: Tensor, documents: Tensor, *, max_span: int | None = None) -> Spans:
    """Positions s < r < t of one document with ``t - s <= max_span``, uniform over all such of the sequence.

    Args:
        words: ``[4, K, b]`` int64, random words.
        documents: ``[b, s]`` integers, see above.
        max_span: The largest t - s; None for no window.

    Returns:
        Spans of three positions.

    Raises:
        UserError: ``max_span < 2``.
    """
    length = documents.shape[1]
    window = checked_window(length, max_span)
    _, after = neighbours(documents)
    reach = after.clamp(max=window)
    bound = count_triples(length, window)
    start, _, allowed = choose_start(reach * (reach - 1) // 2, words[:2], bound=bound)
    choice = reach.gather(1, start.t()).t().clamp(min=2)
    low, high = sorted_pair(words[2] % choice, words[3] % (choice - 1))
    positions = torch.stack((start, start + 1 + low, start + 1 + high))
    return Spans(torch.where(allowed, positions, torch.zeros_like(positions)), allowed)
