"""Linear cross entropy in blocks of the vocabulary: no [n, V] tensor, forward or backward.

The loss of a token is ``log(sum_v exp(x_v - m)) - (x_label - m)`` with ``x = scale * W h`` and ``m = max_v x_v``.
Forward makes the logits a block at a time, folds each into the running maximum and sum (online softmax: Milakov and
Gimelshein, arXiv:1805.02867), and keeps these two numbers a token: the log-sum-exp in two parts, since adding them up
would cost a digit in fp32.  Backward makes each block again and turns it into ``g * (softmax - onehot)``; the gradient
``g`` of each token's loss is known by then, so that loss masks and weights are exact whatever they are.

Blocks are columns and not tokens because of what is added up: a block's rows of the weight gradient come from one
product over all tokens, rounded once, and only the gradient of the hidden states is a sum over blocks.  It is kept in
fp32, [n, h]; with blocks of tokens that sum would be the weight's, [V, h].

Letters: s sequence, b batch, n = s * b tokens, h hidden, V vocabulary with its padding, v = V / tp this rank's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.errors import UserError
from megacpp_stp.flce.parallel import (
    gather_sequence,
    group_rank,
    group_size,
    largest_of_all,
    reduce_hidden_gradient,
    sums_over_all,
)
from megacpp_stp.flce.tiles import Tile, Tiles, wide_dtype

_INDEX_TYPES = (torch.int64, torch.int32)
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a loss is computed with.

    Attributes:
        group: Tensor-parallel ranks, each with an equal part of the vocabulary; None for one rank.
        sequence_parallel: Hidden states are this rank's part of the sequence.
        scale: Factor of the logits.
        ignore_index: A label whose tokens count for nothing: loss 0 and no gradient.
        columns: Of a block; None for `megacpp_stp.flce.tiles.block_columns`.
        with_best: Also find each token's largest logit.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    scale: float = 1.0
    ignore_index: int | None = None
    columns: int | None = None
    with_best: bool = False


class Best(NamedTuple):
    """Each token's largest logit in this rank's part of the vocabulary, the first of equals.

    Attributes:
        values: In the dtype of the weight.
        indices: int64, counted from this rank's first column.
    """

    values: Tensor
    indices: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: Options | None = None
) -> tuple[Tensor, Best | None]:
    """The loss of each token, without logits.

    Gradients reach hidden states and weight, where each needs one.  They are those of Megatron's
    ``ColumnParallelLinear``: all-reduced over the group, or reduce-scattered under sequence parallelism, for the hidden
    states; this rank's part for the weight.  Padding rows of the weight are classes like any other, as they are for
    Megatron.  A label that is no class, and is not ignored, has no label term; that is Megatron's way too.

    Args:
        hidden: [s, b, h] or [n, h]; [s/tp, b, h] under sequence parallelism.
        weight: [v, h], this rank's part, in the dtype of the hidden states.
        labels: [s, b] or [n] of the whole sequence, int64 or int32.
        options: None for one rank and nothing special.

    Returns:
        The losses in the labels' shape, fp32 (fp64 for fp64), and what ``with_best`` asks for, in the same shape.

    Raises:
        UserError: Shapes or dtypes that do not fit each other.
    """
    options = options or Options()
    _check(hidden, weight, labels, options)
    loss, values, indices = _LinearCrossEntropy.apply(hidden, weight, labels, options)
    return loss, Best(values, indices) if options.with_best else None


def best_logits(hidden: Tensor, weight: Tensor, options: Options) -> Best:
    """Each token's largest logit alone, without logits and without a gradient.

    Args:
        hidden: As `linear_cross_entropy` takes it.
        weight: Likewise.
        options: Likewise.

    Returns:
        In the shape of the hidden states of the whole sequence, less its last dimension.
    """
    with torch.no_grad():
        rows = _whole(hidden, options)
        best = _no_best(rows.reshape(-1, rows.shape[-1]), weight)
        for tile in Tiles(rows.reshape(-1, rows.shape[-1]), weight, scale=options.scale, columns=options.columns):
            best = _better(best, tile.raw, tile.start)
        return Best(*(each.view(rows.shape[:-1]) for each in best))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, options: Options) -> None:
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise UserError(
            "hidden states are [s, b, h] or [n, h], the weight [v, h]",
            field="hidden, weight",
            value=(tuple(hidden.shape), tuple(weight.shape)),
            fix="pass the output layer's own input and weight",
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise UserError(
            "hidden states and weight have one floating dtype",
            field="hidden, weight",
            value=(hidden.dtype, weight.dtype),
            fix="cast the hidden states as the model's own output layer would need it",
        )
    tokens = hidden.shape[:-1].numel() * (group_size(options.group) if options.sequence_parallel else 1)
    if labels.numel() != tokens or labels.dtype not in _INDEX_TYPES:
        raise UserError(
            f"there is one label, an int64 or int32, for each of {tokens} tokens",
            field="labels",
            value=(tuple(labels.shape), labels.dtype),
            fix="pass the labels of the whole sequence",
        )


def _whole(hidden: Tensor, options: Options) -> Tensor:
    return gather_sequence(hidden, options.group) if options.sequence_parallel else hidden


def _no_best(rows: Tensor, weight: Tensor) -> Best:
    nothing = torch.full((rows.shape[0],), -torch.inf, dtype=weight.dtype, device=rows.device)
    return Best(nothing, torch.zeros_like(nothing, dtype=torch.int64))


def _better(best: Best, logits: Tensor, start: int) -> Best:
    values, indices = logits.max(dim=-1)
    wins = values > best.values
    return Best(torch.where(wins, values, best.values), torch.where(wins, indices + start, best.indices))


class _Statistics(NamedTuple):
    """Of one pass over this rank's part of the vocabulary: [n] each."""

    peak: Tensor
    total: Tensor
    label_logit: Tensor
    best: Best


def _statistics(rows: Tensor, weight: Tensor, local: Tensor, options: Options) -> _Statistics:
    """Largest logit, sum of exponentials over it, and the label's logit where this rank has it."""
    wide = wide_dtype(weight.dtype)
    peak = torch.full((rows.shape[0],), -torch.inf, dtype=wide, device=rows.device)
    total, label_logit = torch.zeros_like(peak), torch.zeros_like(peak)
    best = _no_best(rows, weight) if options.with_best else Best(peak.new_empty(0), local.new_empty(0))
    for tile in Tiles(rows, weight, scale=options.scale, columns=options.columns):
        if options.with_best:
            best = _better(best, tile.raw, tile.start)
        column, inside = _column(local, tile.start, tile.stop)
        picked = tile.wide.gather(1, column.unsqueeze(1)).squeeze(1)
        label_logit = torch.where(inside, picked, label_logit)
        higher = torch.maximum(peak, tile.wide.amax(dim=-1))
        here = _exponentials(tile.wide, higher).sum(dim=-1)
        total = total.mul_((peak - higher).exp_()).add_(here)
        peak = higher
    return _Statistics(peak, total, label_logit, best)


def _exponentials(wide: Tensor, peak: Tensor) -> Tensor:
    """``exp(wide - peak)`` of each row, in place."""
    wide.sub_(peak.unsqueeze(1))
    if wide.device.type == "cpu":  # where exp2 takes a fourth of the time of exp
        return wide.mul_(_LOG2_E).exp2_()
    return wide.exp_()


def _column(local: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Each label's column in a block, and whether it is in the block at all: if not, the column is any."""
    return (local - start).clamp_(0, stop - start - 1), (local >= start) & (local < stop)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _whole(hidden, options)
        rows = rows.reshape(-1, rows.shape[-1])
        flat = labels.reshape(-1).long()
        local = flat - group_rank(options.group) * weight.shape[0]
        found = _statistics(rows, weight, local, options)
        peak = largest_of_all(found.peak, options.group)
        mine = (local >= 0) & (local < weight.shape[0])
        total, picked = sums_over_all(
            found.total * (found.peak - peak).exp_(),
            torch.where(mine, found.label_logit - peak, torch.zeros_like(peak)),
            options.group,
        )
        loss = total.log() - picked
        if options.ignore_index is not None:
            loss = torch.where(flat == options.ignore_index, torch.zeros_like(loss), loss)
        ctx.save_for_backward(hidden, weight, labels, peak, total)
        ctx.options = options
        best = [each.view(labels.shape) if options.with_best else each for each in found.best]
        ctx.mark_non_differentiable(*best)
        ctx.set_materialize_grads(False)
        return loss.view(labels.shape), best[0], best[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        hidden, weight, labels, peak, total = ctx.saved_tensors
        options: Options = ctx.options
        shape = _whole_shape(hidden, options)
        rows = _whole(hidden, options).reshape(-1, hidden.shape[-1])
        flat = labels.reshape(-1).long()
        slope = grad_loss.reshape(-1).to(peak.dtype) * options.scale
        if options.ignore_index is not None:
            slope = torch.where(flat == options.ignore_index, torch.zeros_like(slope), slope)
        local = flat - group_rank(options.group) * weight.shape[0]
        gradients = _Gradients(rows, weight, hidden=ctx.needs_input_grad[0], weight_too=ctx.needs_input_grad[1])
        at_label = _backward(rows, weight, local, (peak, slope / total, slope), gradients, options)
        grad_hidden = gradients.of_hidden(local, at_label)
        if grad_hidden is not None:
            grad_hidden = reduce_hidden_gradient(
                grad_hidden.view(shape), options.group, sequence_parallel=options.sequence_parallel
            )
        return grad_hidden, gradients.weight, None, None


def _whole_shape(hidden: Tensor, options: Options) -> tuple[int, ...]:
    size = group_size(options.group) if options.sequence_parallel else 1
    return (size * hidden.shape[0], *hidden.shape[1:])


def _backward(
    rows: Tensor,
    weight: Tensor,
    local: Tensor,
    numbers: tuple[Tensor, Tensor, Tensor],
    gradients: _Gradients,
    options: Options,
) -> Tensor:
    """Turn each block into ``slope * (softmax - onehot)`` and take it into the gradients.

    Returns:
        That number at each token's label, [n], 0 where another rank has the label: the hidden states' part of it is
        left to `_Gradients.of_hidden`.
    """
    peak, slope_over_total, slope = numbers
    every = torch.arange(rows.shape[0], device=rows.device)
    nothing = torch.zeros_like(slope)
    at_label = nothing
    for tile in Tiles(rows, weight, scale=options.scale, columns=options.columns):
        wide = _exponentials(tile.wide, peak).mul_(slope_over_total.unsqueeze(1))
        column, inside = _column(local, tile.start, tile.stop)
        found = wide[every, column]
        here = torch.where(inside, found - slope, nothing)
        # Each row once: no two writes to one place, so that the order of threads does not matter.
        wide[every, column] = torch.where(inside, nothing, found)
        if tile.raw.dtype != wide.dtype:
            tile.raw.copy_(wide)
        gradients.add_to_hidden(tile)
        tile.raw[every, column] += here.to(tile.raw.dtype)
        gradients.add_to_weight(tile)
        at_label = at_label + here
    return at_label


class _Gradients:
    """The gradients that are asked for: the weight's by rows, the hidden states' as a sum of at least fp32.

    A CPU rounds the product of two narrow matrices, so that the sum over blocks is one of rounded numbers.  The label's
    part is as large as all others together and of the opposite sign: it is kept out of the products and added in fp32.
    So the error stays below that of one product over the whole vocabulary, whose factors are rounded, too.
    """

    def __init__(self, rows: Tensor, weight: Tensor, *, hidden: bool, weight_too: bool) -> None:
        self._rows, self._weight = rows, weight
        self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if weight_too else None
        self._hidden = torch.zeros_like(rows, dtype=wide_dtype(rows.dtype)) if hidden else None
        narrow = self._hidden is not None and self._hidden.dtype != rows.dtype and rows.device.type != "cuda"
        self._product = torch.empty_like(rows) if narrow else None

    def add_to_weight(self, tile: Tile) -> None:
        """Take in the gradient of one block's logits, [n, w]."""
        if self.weight is not None:
            torch.mm(tile.raw.t(), self._rows, out=self.weight[tile.start : tile.stop])

    def add_to_hidden(self, tile: Tile) -> None:
        """Take in the same, with nothing at the labels."""
        if self._hidden is None:
            return
        part = self._weight[tile.start : tile.stop]
        if self._product is not None:
            self._hidden.add_(torch.mm(tile.raw, part, out=self._product))
        elif self._hidden.dtype != tile.raw.dtype:
            torch.addmm(self._hidden, tile.raw, part, out_dtype=self._hidden.dtype, out=self._hidden)
        else:
            self._hidden.addmm_(tile.raw, part)

    def of_hidden(self, local: Tensor, at_label: Tensor) -> Tensor | None:
        """The gradient of the hidden states [n, h], in their dtype, with the labels' part. To be called once."""
        if self._hidden is None:
            return None
        label_rows = self._weight.index_select(0, local.clamp(0, self._weight.shape[0] - 1))
        self._hidden.add_(label_rows.to(self._hidden.dtype).mul_(at_label.unsqueeze(1)))
        return self._hidden.to(self._rows.dtype)
