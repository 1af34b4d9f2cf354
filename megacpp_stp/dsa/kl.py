"""What both forms of the indexer's loss share: target, divergence, and the way back through the indexer's heads.

Source: DeepSeek-V3.2-Exp's report, section 2.1; megatron-core's ``dsa_indexer_loss.py``.  The loss of a query is
KL(target || softmax of the indexer's scores), the target the attention's probabilities summed over all heads, of all
tensor-parallel ranks, and normalised.  It is linear in the one gradient that reaches it, so its gradients are computed
with it and wait for that factor: exact, and the scores are computed once.

Legend: s queries, b batch, r queries of a chunk, x keys that are compared, i indexer heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-10
"""Smallest sum and probability that is not taken for zero."""


def row_weights(valid_rows: Tensor | None, summed: Tensor, *, coefficient: float, per_token: bool) -> Tensor:
    """What the divergence of each query counts in the loss.

    Args:
        valid_rows: bool [b, s], which queries are tokens and no padding; None for all.
        summed: [b, s, k], as `attention.sparse_attention` gives it: has the sizes, the device and the dtype.
        coefficient: Of the loss.
        per_token: Whether divergences are summed; else the mean over the valid queries is taken.

    Returns:
        [b, s].
    """
    b, s, _ = summed.shape
    counted = summed.new_ones(b, s) if valid_rows is None else valid_rows.to(summed.dtype).expand(b, s)
    weights = coefficient * counted
    return weights if per_token else weights / counted.sum().clamp_min(1.0)


def normalised_target(summed: Tensor, tp_group: Any) -> Tensor:
    """Probabilities [b, s, x] summed over the heads of this rank, as a distribution over x; changes ``summed``."""
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(summed, group=tp_group)
    return summed.div_(summed.sum(dim=-1, keepdim=True).clamp_min_(EPSILON))


def divergence(target: Tensor, scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(scores)) of each row, and its gradient.

    Args:
        target: [..., x], zero where hidden.
        scores: [..., x], the indexer's.
        hidden: bool, which keys are no part of it.

    Returns:
        [...], and the gradient with respect to the scores [..., x].
    """
    logs = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    grad = logs.exp().sub_(target).masked_fill_(hidden, 0.0)
    logs.masked_fill_(hidden, 0.0)
    return (target * target.clamp_min(EPSILON).log_().sub_(logs)).sum(dim=-1), grad


def grad_through_heads(heads: Tensor, weights: Tensor, grad_scores: Tensor, *, use_relu: bool) -> tuple[Tensor, Tensor]:
    """Backwards through the weighted sum over heads and the ReLU; overwrites ``heads``.

    Args:
        heads: [..., i, x], products of queries and keys, behind the ReLU.
        weights: [..., i].
        grad_scores: [..., x].
        use_relu: Whether there is a ReLU.

    Returns:
        Gradients of the weights [..., i] and of the products [..., i, x].
    """
    # As a row times a matrix: the other way round, a CPU's library takes fifteen times as long.
    grad_weights = torch.matmul(grad_scores.unsqueeze(-2), heads.transpose(-1, -2)).squeeze(-2)
    passed = heads.gt_(0) if use_relu else heads.fill_(1)
    return grad_weights, passed.mul_(weights.unsqueeze(-1)).mul_(grad_scores.unsqueeze(-2))


def keep_gradients(ctx: Any, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    """Keep gradients of ``inputs`` for `scaled_gradients`, in their dtypes; fp16, whose range is too small, in fp32.

    Args:
        ctx: Of the autograd function.
        inputs: What the gradients are of.
        grads: For a gradient of one of the loss.
    """
    ctx.dtypes = [one.dtype for one in inputs]
    kept = [torch.float32 if dtype == torch.float16 else dtype for dtype in ctx.dtypes]
    ctx.save_for_backward(*(grad.to(dtype) for grad, dtype in zip(grads, kept, strict=True)))


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """The kept gradients times that of the loss."""
    return [(grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
