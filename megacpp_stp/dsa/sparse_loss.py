"""The indexer's loss over the chosen keys: the sparse form, O(s k) in all.

Source: megatron-core's ``dsa.py``, ``FusedDSAIndexerLoss`` with ``sparse_loss``.

Legend: s queries, t keys, b batch, i indexer heads, d indexer channels, k chosen keys, m query rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.dsa.attention import Chosen, key_table
from megacpp_stp.dsa.chunks import compute_dtype, row_chunks, scratch_of
from megacpp_stp.dsa.kl import (
    divergence,
    grad_through_heads,
    keep_gradients,
    normalised_target,
    scaled_gradients,
)


def sparse_indexer_loss(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    indices: Tensor,
    summed: Tensor,
    row_weight: Tensor,
    *,
    use_relu: bool = True,
    tp_group: Any = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """The loss over the chosen keys, with a gradient for the indexer alone.

    Args:
        q: [s, b, i, d], the indexer's queries.
        weights: [s, b, i], of the heads.
        k: [t, b, d], the indexer's keys.
        indices: [b, s, k], the chosen keys, as `selection.select_keys` gives them.
        summed: [b, s, k], the attention's probabilities summed over this rank's heads
            (`attention.sparse_attention`). Becomes the target.
        row_weight: [b, s], see `kl.row_weights`.
        use_relu: Whether negative products count as zero.
        tp_group: Tensor-parallel group whose ranks hold the other heads; None for none.
        scratch_bytes: What may be taken at a time; by device when None.

    Returns:
        A scalar in the compute dtype.
    """
    target = normalised_target(summed, tp_group)
    scratch = scratch_bytes or scratch_of(q.device)
    return _SparseIndexerLoss.apply(q, weights, k, indices, target, row_weight, use_relu, scratch)


class _SparseIndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        weights: Tensor,
        k: Tensor,
        indices: Tensor,
        target: Tensor,
        row_weight: Tensor,
        use_relu: bool,
        scratch_bytes: int,
    ) -> Tensor:
        s, b, i, d = q.shape
        chosen_count, table = indices.shape[-1], key_table(k)
        dtype = compute_dtype(q.dtype)
        loss = target.new_zeros(())
        grad_q, grad_weights = torch.empty_like(q, dtype=dtype), torch.empty_like(weights, dtype=dtype)
        grad_table = torch.zeros_like(table)
        per_row = b * chosen_count * ((3 * i + 2 * d + 6) * dtype.itemsize + 2 * 8)
        for rows in row_chunks(s, bytes_per_row=per_row, scratch_bytes=scratch_bytes):
            chosen = Chosen(table, indices[:, rows])
            queries, factors = q[rows].flatten(0, 1).to(dtype), weights[rows].flatten(0, 1).to(dtype)
            heads = torch.bmm(queries, chosen.keys.transpose(1, 2))
            if use_relu:
                heads.relu_()
            scores = torch.bmm(factors.unsqueeze(1), heads).squeeze(1)
            wanted = target[:, rows].transpose(0, 1).flatten(0, 1)
            counts = row_weight[:, rows].t().reshape(-1)
            diverged, grad_scores = divergence(wanted, scores, chosen.missing)
            loss += torch.dot(diverged, counts)
            grad_factors, grad_heads = grad_through_heads(
                heads, factors, grad_scores.mul_(counts[:, None]), use_relu=use_relu
            )
            grad_weights[rows] = grad_factors.view(-1, b, i)
            grad_q[rows] = torch.bmm(grad_heads, chosen.keys).view(-1, b, i, d)
            grad_keys = torch.bmm(grad_heads.transpose(1, 2), queries)
            grad_table.index_add_(0, chosen.places, grad_keys.flatten(0, 1))
        keep_gradients(ctx, (q, weights, k), (grad_q, grad_weights, grad_table.view(k.shape)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_loss), None, None, None, None, None)
