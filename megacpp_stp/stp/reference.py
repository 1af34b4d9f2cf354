"""The plain truth that the fast code is tested against: loops, autograd, Python integers. Never used in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor


def reference_stp_loss(hidden_sbh: Tensor, triples: Iterable[tuple[int, int, int, int]], *, tolerance: float) -> Tensor:
    """Mean of ``1 - cos(h_r - h_s, h_t - h_r)`` over valid triples, one at a time, by autograd.

    Args:
        hidden_sbh: ``[s, b, h]``, any floating dtype; computed in it.
        triples: ``(batch, s, r, t)`` each.
        tolerance: See `megacpp_stp.stp.objective.stp_terms`.
    """
    terms = []
    for batch, s, r, t in triples:
        h_s, h_r, h_t = (hidden_sbh[i, batch] for i in (s, r, t))
        u, v = h_r - h_s, h_t - h_r
        if u.norm() <= tolerance * max(h_s.norm(), h_r.norm()) or v.norm() <= tolerance * max(h_r.norm(), h_t.norm()):
            continue
        terms.append(1 - torch.dot(u, v) / (u.norm() * v.norm()))
    return torch.stack(terms).mean() if terms else hidden_sbh.new_zeros(())


def reference_chord_loss(
    hidden_sbh: Tensor, patches: Iterable[tuple[int, int, int, int, int]], *, tolerance: float
) -> Tensor:
    """Mean of ``1 - cos(h_r - h_s, (h_s - h_a) + (h_e - h_r))`` over valid patches, one at a time, by autograd.

    Args:
        hidden_sbh: ``[s, b, h]``, any floating dtype; computed in it.
        patches: ``(batch, a, s, r, e)`` each.
        tolerance: See `megacpp_stp.stp.chord.chord_terms`.
    """
    terms = []
    for batch, *places in patches:
        h_a, h_s, h_r, h_e = points = [hidden_sbh[i, batch] for i in places]
        patch, rest = h_r - h_s, (h_s - h_a) + (h_e - h_r)
        longest = max(point.norm() for point in points)
        if patch.norm() <= tolerance * max(h_s.norm(), h_r.norm()) or rest.norm() <= tolerance * longest:
            continue
        terms.append(1 - torch.dot(patch, rest) / (patch.norm() * rest.norm()))
    return torch.stack(terms).mean() if terms else hidden_sbh.new_zeros(())


def _one_document(documents: Sequence[int], first: int, last: int) -> bool:
    return documents[first] >= 0 and len(set(documents[first : last + 1])) == 1


def reference_triples(documents: Sequence[int], *, max_span: int | None = None) -> list[tuple[int, int, int]]:
    """All allowed triples of one sequence, by looking at each.

    Args:
        documents: One sequence's document numbers; see `megacpp_stp.stp.documents`.
        max_span: The largest t - s; None for no limit.
    """
    limit = len(documents) if max_span is None else max_span
    every = combinations(range(len(documents)), 3)
    return [(s, r, t) for s, r, t in every if t - s <= limit and _one_document(documents, s, t)]


def reference_patches(documents: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """All patches ``(a, s, r, e)`` of one sequence's documents but the whole documents, by looking at each."""
    found = []
    for a, e in combinations(range(len(documents)), 2):
        whole = (a == 0 or not _one_document(documents, a - 1, a)) and (
            e == len(documents) - 1 or not _one_document(documents, e, e + 1)
        )
        if whole and _one_document(documents, a, e):
            found += [(a, s, r, e) for s, r in combinations(range(a, e + 1), 2) if (s, r) != (a, e)]
    return found


def reference_words(
    *, seed: int, iteration: int, microbatch: int, data_rank: int, layer: int, index: int
) -> tuple[int, int, int, int]:
    """The four random words of one span, `index` counting over ``[K, b]``."""
    halves: list[int] = []
    for block in (0, 1):
        halves += reference_philox((index, 2 * layer + block, microbatch, iteration), (seed, data_rank))
    first, second, third, fourth = ((halves[i] & 0x7FFFFFFF) << 32 | halves[i + 1] for i in range(0, 8, 2))
    return first, second, third, fourth


def reference_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on Python integers (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: Four 32-bit words.
        key: Two 32-bit words.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
