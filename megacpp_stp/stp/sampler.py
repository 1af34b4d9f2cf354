"""Which triples a tap reads: counter-based, so that a draw is a pure function of where it stands.

The key is (seed, data-parallel rank), the counter (index, layer, microbatch, iteration). So tensor-, context- and
pipeline-parallel ranks agree, a recomputed or repeated step redraws the same triples, and neither torch's nor
Megatron's random streams are read. Nothing here synchronises with a GPU.

Letters: b batch, s sequence, K spans a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacpp_stp.stp.objective import distinct_sorted

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, slots=True)
class DrawKey:
    """Where a draw stands. Each part is below 2**32 (the layer below 2**31), so equal draws mean equal keys.

    Attributes:
        seed: ``stp.seed`` of the recipe.
        iteration: Iterations completed before this one.
        microbatch: Microbatch within the iteration.
        data_rank: Data-parallel rank.
        layer: Global Megatron layer number of the tap.
    """

    seed: int
    iteration: int
    microbatch: int
    data_rank: int
    layer: int

    def __post_init__(self) -> None:
        parts = (self.seed, self.iteration, self.microbatch, self.data_rank, 2 * self.layer + 1)
        assert all(0 <= part <= _MASK for part in parts), self


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, in 16-bit halves: no product leaves int64's defined range."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    high = (high_half + (low_half >> 16)) >> 16
    low = (((high_half & 0xFFFF) << 16) + low_half) & _MASK
    return high, low


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors.

    Args:
        counter: ``[4, ...]`` int64, 32-bit words.
        key: Two 32-bit words.

    Returns:
        ``[4, ...]`` int64, 32-bit words; equal to `megacpp_stp.stp.reference.reference_philox`.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


def draw_triples(key: DrawKey, *, length: int, batch: int, n_spans: int, device: torch.device) -> Tensor:
    """Positions s < r < t of each span, uniform over the triples of one sequence.

    Each position comes from 63 random bits by remainder, so a triple's probability differs from uniform by less
    than ``length / 2**60`` relative.

    Args:
        key: Where the draw stands.
        length: Sequence length, at least 3.
        batch: Sequences in the microbatch.
        n_spans: Triples a sequence.
        device: Where to draw.

    Returns:
        ``[3, K, b]`` int64.
    """
    assert length >= 3, length
    index = torch.arange(n_spans * batch, dtype=torch.int64, device=device)
    words = []
    for block in (0, 1):
        counter = torch.empty(4, n_spans * batch, dtype=torch.int64, device=device)
        counter[0] = index
        counter[1] = 2 * key.layer + block
        counter[2] = key.microbatch
        counter[3] = key.iteration
        words.append(philox(counter, (key.seed, key.data_rank)))
    w = torch.cat(words)
    bits = ((w[0:6:2] & 0x7FFFFFFF) << 32) | w[1:6:2]
    triples = distinct_sorted(bits[0] % length, bits[1] % (length - 1), bits[2] % (length - 2))
    return triples.reshape(3, n_spans, batch)
