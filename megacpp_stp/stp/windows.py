"""Triples of one sequence: from random words to positions s < r < t, uniform, in static shapes, by integers alone.

Letters: T sequence length, W window (the largest t - s), K spans a sequence, b batch.

A word is a random integer of at least 62 bits; ``word % n`` makes it one below n, with probabilities that differ
from 1/n by less than ``n / 2**62``, relative. Everything after that is exact: each allowed triple comes from equally
many draws, nothing is rejected or clamped.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from megacpp_stp.errors import UserError


def checked_window(length: int, max_span: int | None) -> int:
    """The largest t - s in a sequence of `length` positions; `max_span` None or beyond the end: no restriction.

    Raises:
        UserError: ``max_span < 2``, which leaves no room for r.
    """
    if max_span is None:
        return length - 1
    if max_span < 2:
        raise UserError(
            "leaves no room for a position between the ends",
            field="max_span",
            value=max_span,
            fix="allow t - s of 2 or more, or leave it out for the whole sequence",
        )
    return min(max_span, length - 1)


def count_triples(length: int, window: int) -> int:
    """How many triples have ``t - s <= window``: the first T - W positions have W followers, the rest is a C(W, 3)."""
    return (length - window) * comb(window, 2) + comb(window, 3) if length >= 3 else 0


def distinct_sorted(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Three draws from U[0, T), U[0, T-1), U[0, T-2) to three distinct positions, sorted; exactly uniform.

    The later draws skip what is taken, so every triple comes from exactly six draws.

    Args:
        a: int64, any shape.
        b: Like `a`.
        c: Like `a`.

    Returns:
        ``[3, *a.shape]``.
    """
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    return torch.stack((a, b, c)).sort(dim=0).values


def sorted_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from U[0, n) and U[0, n-1) to two distinct numbers below n, sorted; every pair comes from two draws."""
    b = b + (b >= a)
    return torch.minimum(a, b), torch.maximum(a, b)


def windowed_triples(a: Tensor, b: Tensor, x: Tensor, *, length: int, window: int) -> Tensor:
    """Draws to triples with ``t - s <= window``; exactly uniform.

    The first T - W positions have W followers each, so C(W, 2) triples start there; the last W positions hold
    C(W, 3) triples among themselves. In all that is ``W (W-1) (3T - 2W - 2) / 6``, which is the number of draws
    over six. Of the values of x, three a position pick a start, to go with the pair (a, b); the last W - 2 go with
    (a, b) as the third draw of a triple of the last W positions. So each triple comes from exactly six draws.

    Args:
        a: U[0, W), int64, any shape.
        b: U[0, W-1).
        x: U[0, 3T - 2W - 2).
        length: T, at least 3.
        window: W, from 2 to T - 1.

    Returns:
        ``[3, *a.shape]``.
    """
    starts = length - window
    low, high = sorted_pair(a, b)
    start = x // 3
    first = torch.stack((start, start + 1 + low, start + 1 + high))
    last = starts + distinct_sorted(a, b, x - 3 * starts)
    return torch.where(x < 3 * starts, first, last)


def triples_of_sequence(words: Tensor, *, length: int, max_span: int | None = None) -> Tensor:
    """Positions s < r < t, uniform over the triples of ``range(length)`` with ``t - s <= max_span``.

    Args:
        words: ``[>= 3, K, b]`` int64, random words.
        length: T, at least 3.
        max_span: The largest t - s; None for the whole sequence.

    Returns:
        ``[3, K, b]`` int64.

    Raises:
        UserError: ``max_span < 2``.
    """
    assert length >= 3, length
    window = checked_window(length, max_span)
    if window == length - 1:
        return distinct_sorted(words[0] % length, words[1] % (length - 1), words[2] % (length - 2))
    a, b, x = words[0] % window, words[1] % (window - 1), words[2] % (3 * length - 2 * window - 2)
    return windowed_triples(a, b, x, length=length, window=window)
