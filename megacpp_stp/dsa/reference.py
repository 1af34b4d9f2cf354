"""Sparse attention as the formulas read, with tensors of all heads and all keys: the truth of the tests.

Source: DeepSeek-V3.2-Exp's report, section 2.1.  Gradients are autograd's.

Legend: s queries, t keys, b batch, n attention heads, e channels of queries and keys, v of values (the first of a
key), i indexer heads, d indexer channels, k chosen keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpp_stp.dsa.bounds import Bounds


def reference_scores(q: Tensor, weights: Tensor, k: Tensor, *, use_relu: bool = True) -> Tensor:
    """The indexer's scores [b, s, t] of q [s, b, i, d], weights [s, b, i] and k [t, b, d]."""
    products = torch.einsum("sbid,tbd->bist", q, k)
    return torch.einsum("bist,sbi->bst", products.relu() if use_relu else products, weights)


def reference_selection(scores: Tensor, bounds: Bounds, *, topk: int) -> Tensor:
    """The chosen keys as bool [b, s, t]: the ``topk`` highest scores among those that are seen, ties to the left."""
    seen = scores.masked_fill(bounds.hidden(slice(0, scores.shape[1]), scores.shape[2]), -torch.inf)
    ranks = seen.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    return (ranks < topk) & (seen > -torch.inf)


def reference_attention(query: Tensor, key: Tensor, chosen: Tensor, *, scale: float, value_channels: int) -> Tensor:
    """Attention of query [s, b, n, e] to the chosen ones (bool [b, s, t]) of key [t, b, e]: [s, b, n, v]."""
    return torch.einsum("bnst,tbv->sbnv", _probabilities(query, key, chosen, scale), key[..., :value_channels])


def reference_loss(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    compared: Tensor,
    *,
    scale: float,
    coefficient: float,
    valid_rows: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """The indexer's loss.

    Args:
        scores: [b, s, t], of `reference_scores`.
        query: [s, b, n, e]; gets no gradient.
        key: [t, b, e]; gets no gradient.
        compared: bool [b, s, t]: the chosen keys, or all that are seen.
        scale: Multiplies the attention's scores.
        coefficient: Of the loss.
        valid_rows: bool [b, s], which queries are tokens; None for all.
        per_token: Whether divergences are summed; else the mean over the valid queries is taken.
    """
    target = _probabilities(query.detach(), key.detach(), compared, scale).mean(dim=1)
    predicted = scores.masked_fill(~compared, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    # A query that sees nothing has a target of zeros: its divergence is zero.
    rows = torch.where(compared, torch.special.xlogy(target, target) - target * predicted, 0.0).sum(dim=-1)
    valid = torch.ones_like(rows, dtype=torch.bool) if valid_rows is None else valid_rows
    total = rows.masked_fill(~valid, 0.0).sum()
    return coefficient * (total if per_token else total / valid.sum().clamp_min(1))


def _probabilities(query: Tensor, key: Tensor, chosen: Tensor, scale: float) -> Tensor:
    mask = ~chosen.unsqueeze(1)
    scores = torch.einsum("sbne,tbe->bnst", query, key) * scale
    return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(mask, 0.0)
