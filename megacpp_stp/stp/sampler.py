"""Which triples a tap reads: counter-based, so that a draw is a pure function of where it stands.

The key is (seed, data-parallel rank), the counter (index, layer, microbatch, iteration). So tensor-, context- and
pipeline-parallel ranks agree, a recomputed or repeated step redraws the same triples, and neither torch's nor
Megatron's random streams are read. Nothing here synchronises with a GPU. Which triples are allowed is in
`megacpp_stp.stp.windows` and `megacpp_stp.stp.documents`.

Letters: b batch, s sequence, K spans a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacpp_stp.stp.documents import Spans, checked_documents, triples_of_documents
from megacpp_stp.stp.windows import triples_of_sequence

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

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """The fields, in their order."""
        return self.seed, self.iteration, self.microbatch, self.data_rank, self.layer

    def as_tensor(self, device: torch.device) -> Tensor:
        """``[5]`` int64, the fields in their order: a key to draw with inside a compiled step.

        A compiler takes Python integers for constants and would compile anew in each iteration. The values of a
        tensor are free to change.
        """
        # Filled on the device: copying from host memory would wait for it.
        return torch.stack([torch.full((), part, dtype=torch.int64, device=device) for part in self.parts])


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, in 16-bit halves: no product leaves int64's defined range."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    high = (high_half + (low_half >> 16)) >> 16
    low = (((high_half & 0xFFFF) << 16) + low_half) & _MASK
    return high, low


def philox(counter: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors.

    Args:
        counter: ``[4, ...]`` int64, 32-bit words.
        key: Two 32-bit words, each an integer or a 0-dim int64 tensor.

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


def random_words(key: DrawKey | Tensor, *, n_spans: int, batch: int, device: torch.device) -> Tensor:
    """Four random words of 63 bits for each span: ``[4, K, b]`` int64.

    Args:
        key: Where the draw stands; its tensor form (on `device`) inside a compiled step.
        n_spans: Spans a sequence.
        batch: Sequences in the microbatch.
        device: Where to draw.
    """
    seed, iteration, microbatch, data_rank, layer = key.parts if isinstance(key, DrawKey) else key.unbind()
    spans = n_spans * batch
    counter = torch.empty(4, 2, spans, dtype=torch.int64, device=device)
    counter[0] = torch.arange(spans, device=device)
    counter[1] = (2 * layer + torch.arange(2, device=device)).unsqueeze(1)
    counter[2] = microbatch
    counter[3] = iteration
    halves = philox(counter, (seed, data_rank)).transpose(0, 1).reshape(8, spans)
    words = ((halves[0::2] & 0x7FFFFFFF) << 32) | halves[1::2]
    return words.reshape(4, n_spans, batch)


def draw_triples(
    key: DrawKey | Tensor,
    *,
    length: int,
    batch: int,
    n_spans: int,
    device: torch.device,
    max_span: int | None = None,
) -> Tensor:
    """Positions s < r < t of each span, uniform over the triples of one sequence.

    A triple's probability differs from uniform by less than ``length / 2**60`` relative.

    Args:
        key: Where the draw stands; its tensor form (on `device`) inside a compiled step.
        length: Sequence length, at least 3.
        batch: Sequences in the microbatch.
        n_spans: Triples a sequence.
        device: Where to draw.
        max_span: The largest t - s, at least 2; None for no limit.

    Returns:
        ``[3, K, b]`` int64.

    Raises:
        UserError: ``max_span < 2``.
    """
    words = random_words(key, n_spans=n_spans, batch=batch, device=device)
    return triples_of_sequence(words, length=length, max_span=max_span)


def draw_document_triples(
    key: DrawKey | Tensor, documents: Tensor, *, n_spans: int, max_span: int | None = None
) -> Spans:
    """Positions s < r < t of each span, uniform over the triples inside the documents of one sequence.

    A triple's probability differs from uniform by less than ``2**-39`` relative.

    Args:
        key: Where the draw stands; its tensor form (on the documents' device) inside a compiled step.
        documents: ``[b, s]`` integers: neighbours of equal number are one document, negative is padding.
        n_spans: Triples a sequence.
        max_span: The largest t - s, at least 2; None for no limit.

    Returns:
        Positions ``[3, K, b]``, and ``[K, b]`` bool, false throughout a sequence in which no triple is allowed. Its
        positions are 0 then: one state has no direction, so they count for nothing even without a look at the flag.

    Raises:
        UserError: ``max_span < 2``, or documents that are not ``[b, s]`` integers.
    """
    batch, length = documents.shape
    checked_documents(documents, batch=batch, length=length)
    words = random_words(key, n_spans=n_spans, batch=batch, device=documents.device)
    return triples_of_documents(words, documents, max_span=max_span)
