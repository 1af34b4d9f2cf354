"""Linear cross entropy, plainly: all logits at once, one process, autograd's own backward.

Letters: n tokens, h hidden, V vocabulary (padding included).
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 1.0, ignore_index: int | None = None
) -> Tensor:
    """The loss of each token, as Megatron's output layer and ``vocab_parallel_cross_entropy`` give it.

    ``loss = log(sum_v exp(x_v - m)) - (x_label - m)`` with ``x = scale * hidden @ weight.T`` and ``m = max_v x_v``.
    Every row of the weight is a class, a padding row too.  A label that is no class has no second term.

    Args:
        hidden: [n, h], any floating dtype; differentiable.
        weight: [V, h], the same dtype; differentiable.
        labels: [n], integers.
        scale: Factor of the logits.
        ignore_index: A label whose tokens count for nothing: loss 0 and no gradient.

    Returns:
        [n], at least fp32.
    """
    logits = torch.nn.functional.linear(hidden, weight)
    if scale != 1.0:
        logits = logits * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    known = (labels >= 0) & (labels < weight.shape[0])
    picked = shifted.gather(1, labels.clamp(0, weight.shape[0] - 1).unsqueeze(1)).squeeze(1)
    loss = shifted.exp().sum(dim=-1).log() - torch.where(known, picked, torch.zeros_like(picked))
    if ignore_index is None:
        return loss
    return torch.where(labels == ignore_index, torch.zeros_like(loss), loss)
