"""One tap's draw and its terms, as a run's policy says: which objective, which window, inside documents or not.

Letters: s sequence, b batch, h hidden, K spans a sequence, m points a span (3 of a triple, 4 of a chord), n = K * b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpp_stp.stp.chord import ChordTerms, chord_terms, patches_of_documents, patches_of_sequence
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.documents import checked_documents, triples_of_documents
from megacpp_stp.stp.objective import StpTerms, stp_terms
from megacpp_stp.stp.sampler import DrawKey, random_words
from megacpp_stp.stp.windows import triples_of_sequence


def draw_spans(
    config: StpConfig, key: DrawKey, *, length: int, batch: int, device: torch.device, documents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The positions that a tap reads.

    Args:
        config: Which spans.
        key: Where the draw stands.
        length: s, at least 3.
        batch: b.
        device: Where to draw.
        documents: ``[b, s]`` integers to stay inside of; None for whole sequences.

    Returns:
        ``[m, K, b]`` int64, and which spans are allowed, ``[K, b]`` bool; None for all.

    Raises:
        UserError: Documents that are not ``[b, s]`` integers.
    """
    words = random_words(key, n_spans=config.n_spans, batch=batch, device=device)
    if documents is None:
        if config.objective == "chord":
            return patches_of_sequence(words, length=length), None
        return triples_of_sequence(words, length=length, max_span=config.max_span), None
    checked_documents(documents, batch=batch, length=length)
    if config.objective == "chord":
        return patches_of_documents(words, documents)
    return triples_of_documents(words, documents, max_span=config.max_span)


def span_terms(
    config: StpConfig, rows: Tensor, *, tolerance: float, allowed: Tensor | None = None
) -> StpTerms | ChordTerms:
    """Value and gradient of the objective on rows ``[m, n, h]``; arguments as in `stp_terms` and `chord_terms`."""
    terms = chord_terms if config.objective == "chord" else stp_terms
    return terms(rows, tolerance=tolerance, allowed=allowed)
