"""The indexer's loss over all keys that a query sees: the dense form, O(s^2) work in a scratch of a fixed size.

Source: megatron-core's ``dsa.py``, ``FusedDSAIndexerLoss`` without ``sparse_loss``.

Legend: s queries, t keys, b batch, n attention heads of this tensor-parallel rank, e channels of queries and keys,
i indexer heads, d indexer channels, r queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.dsa.bounds import Bounds, removal
from megacpp_stp.dsa.chunks import compute_dtype, row_chunks, scratch_of
from megacpp_stp.dsa.kl import (
    divergence,
    grad_through_heads,
    keep_gradients,
    normalised_target,
    scaled_gradients,
)
from megacpp_stp.dsa.selection import head_scores, weigh_heads


def dense_indexer_loss(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    row_weight: Tensor,
    *,
    bounds: Bounds,
    scale: float,
    use_relu: bool = True,
    tp_group: Any = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """The loss over all keys, with a gradient for the indexer alone.

    Args:
        q: [s, b, i, d], the indexer's queries.
        weights: [s, b, i], of the heads.
        k: [t, b, d], the indexer's keys.
        query: [s, b, n, e], the attention's queries.
        key: [t, b, e], its keys.
        row_weight: [b, s], see `kl.row_weights`.
        bounds: What each query sees.
        scale: Multiplies the attention's scores.
        use_relu: Whether negative products count as zero.
        tp_group: Tensor-parallel group whose ranks hold the other heads; None for none. They sum the target of one
            chunk after the other.
        scratch_bytes: What may be taken at a time; by device when None.

    Returns:
        A scalar in the compute dtype.
    """
    scratch = scratch_bytes or scratch_of(q.device)
    arguments = (query.detach(), key.detach(), row_weight, bounds, scale, use_relu, tp_group, scratch)
    return _DenseIndexerLoss.apply(q, weights, k, *arguments)


class _DenseIndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        weights: Tensor,
        k: Tensor,
        query: Tensor,
        key: Tensor,
        row_weight: Tensor,
        bounds: Bounds,
        scale: float,
        use_relu: bool,
        tp_group: Any,
        scratch_bytes: int,
    ) -> Tensor:
        (s, b, i, d), n, dtype = q.shape, query.shape[2], compute_dtype(q.dtype)
        t, keys, attended = k.shape[0], k.to(dtype), key.to(dtype)
        loss = keys.new_zeros(())
        grad_q, grad_weights = torch.empty_like(q, dtype=dtype), torch.empty_like(weights, dtype=dtype)
        grad_k = keys.new_zeros(b, t, d)
        per_row = b * t * (2 * max(i, n) + 6) * dtype.itemsize
        for rows in row_chunks(s, bytes_per_row=per_row, scratch_bytes=scratch_bytes):
            count = bounds.key_count(rows, t)
            hidden = bounds.hidden(rows, count)
            target = normalised_target(head_sum(query[rows].to(dtype), attended[:count], hidden, scale=scale), tp_group)
            queries, factors = q[rows].to(dtype), weights[rows].to(dtype)
            heads = head_scores(queries, keys[:count], use_relu=use_relu)
            diverged, grad_scores = divergence(target, weigh_heads(heads, factors), hidden)
            counts = row_weight[:, rows]
            loss += (diverged * counts).sum()
            grad_factors, grad_heads = grad_through_heads(
                heads, factors.transpose(0, 1), grad_scores.mul_(counts.unsqueeze(-1)), use_relu=use_relu
            )
            grad_weights[rows] = grad_factors.transpose(0, 1)
            grad_heads = grad_heads.flatten(1, 2)  # [b, r * i, t]
            grad_q[rows] = torch.bmm(grad_heads, keys[:count].transpose(0, 1)).view(b, -1, i, d).transpose(0, 1)
            flat = queries.transpose(0, 1).reshape(b, -1, d)
            grad_k[:, :count].baddbmm_(grad_heads.transpose(1, 2), flat)
        keep_gradients(ctx, (q, weights, k), (grad_q, grad_weights, grad_k.transpose(0, 1)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_loss), *(None,) * 8)


def head_sum(query: Tensor, key: Tensor, hidden: Tensor, *, scale: float) -> Tensor:
    """The attention's probabilities over all keys, summed over heads.

    Args:
        query: [r, b, n, e], in the compute dtype.
        key: [t, b, e], likewise.
        hidden: bool [r, t], which keys a query does not see.
        scale: Multiplies the scores.

    Returns:
        [b, r, t].
    """
    scores = head_scores(query, key, use_relu=False).mul_(scale).add_(removal(hidden, query.dtype).unsqueeze(1))
    # A query that sees nothing has equal scores until here.
    return scores.softmax(dim=-1).sum(dim=2).masked_fill_(hidden, 0.0)
