"""The plain truth that the fast code is tested against: loops, autograd, Python integers. Never used in training."""

from __future__ import annotations

from collections.abc import Iterable

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
