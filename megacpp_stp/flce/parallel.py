"""What the ranks of a tensor-parallel group tell each other about one loss.

Letters: s sequence, b batch, h hidden, n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group; 1 where there is none."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's place in the group."""
    return 0 if group is None else group.rank()


def gather_sequence(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The whole sequence from its shards, in rank order: [s/tp, b, h] to [s, b, h]."""
    size = group_size(group)
    if size == 1:
        return hidden
    whole = hidden.new_empty((size * hidden.shape[0], *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def reduce_hidden_gradient(gradient: Tensor, group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> Tensor:
    """Sum what the vocabulary shards gave to the hidden states.

    Args:
        gradient: Of the whole sequence, [s, b, h]; used up.
        group: Tensor-parallel ranks.
        sequence_parallel: Keep this rank's shard of the sequence only, [s/tp, b, h].
    """
    size = group_size(group)
    if size == 1:
        return gradient
    if not sequence_parallel:
        dist.all_reduce(gradient, group=group)
        return gradient
    shard = gradient.new_empty((gradient.shape[0] // size, *gradient.shape[1:]))
    dist.reduce_scatter_tensor(shard, gradient, group=group)
    return shard


def largest_of_all(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The elementwise maximum over the group."""
    if group_size(group) == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def sums_over_all(first: Tensor, second: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The sums over the group of two tensors of one shape, in one message."""
    if group_size(group) == 1:
        return first, second
    both = torch.stack((first, second))
    dist.all_reduce(both, group=group)
    return both[0], both[1]


class GatherSequence(torch.autograd.Function):
    """`gather_sequence` for what has its own gradient for the whole sequence: [s/tp, b, h] to [s, b, h] and back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The whole sequence."""
        ctx.group = group
        return gather_sequence(hidden, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The sum over the group of this rank's shard."""
        return reduce_hidden_gradient(gradient.contiguous(), ctx.group, sequence_parallel=True), None
