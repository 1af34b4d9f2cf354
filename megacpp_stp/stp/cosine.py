"""``1 - cos`` of two directions: value, closed-form gradient, and a differentiable form. Degenerate ones masked.

Letters: n pairs of directions, h hidden; u, v the directions ``[n, h]``, û and v̂ of length 1, ``L = 1 - û·v̂``.

Computed as ``L = |û - v̂|² / 2``, the same number: ``1 - û·v̂`` cancels where the path is nearly straight, and is
then noise of the size of the machine epsilon, of either sign. This form keeps its relative precision down to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bend(NamedTuple):
    """Mean ``1 - cos`` over the valid pairs of directions.

    Attributes:
        loss: Scalar in [0, 2]; 0 when no pair is valid.
        valid: Scalar, the number of valid pairs, in the loss's dtype.
        grad_u: ``[n, h]``, d loss / d u; 0 for pairs that are not valid.
        grad_v: ``[n, h]``, d loss / d v.
    """

    loss: Tensor
    valid: Tensor
    grad_u: Tensor
    grad_v: Tensor


def _peak(vectors: Tensor) -> Tensor:
    """Largest entry by size, ``[..., 1]``; 1 where all are 0. The squares of ``vectors / peak`` stay in range."""
    peak = vectors.detach().abs().amax(-1, keepdim=True)
    return torch.where(peak == 0, torch.ones_like(peak), peak)


def lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths ``[...]`` of ``[..., h]``, also where the squares would leave the dtype; NaN for infinity."""
    peak = _peak(vectors)
    return (vectors / peak).norm(dim=-1) * peak.squeeze(-1)


def _measure(u: Tensor, v: Tensor, *, size_u: Tensor, size_v: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    """Lengths of u and v, 1 where the pair is degenerate, and the mask ``[n]`` of valid pairs.

    A direction is degenerate when it is not longer than `tolerance` times the longest state that it was taken from:
    then it is the states' rounding error and says nothing. Below the smallest normal number it is degenerate too:
    the gradient, which goes with 1 / length, would leave the dtype. What is not a number stays valid and so
    reaches the loss, even beside a degenerate partner.
    """
    norm_u, norm_v = lengths(u), lengths(v)
    floor = torch.finfo(u.dtype).tiny
    degenerate = norm_u <= (tolerance * size_u).clamp(min=floor)
    degenerate = degenerate | (norm_v <= (tolerance * size_v).clamp(min=floor))
    valid = ~degenerate | torch.isnan(norm_u + norm_v)
    one = torch.ones_like(norm_u)
    return torch.where(valid, norm_u, one), torch.where(valid, norm_v, one), valid


@torch.no_grad()
def bend(u: Tensor, v: Tensor, *, size_u: Tensor, size_v: Tensor, tolerance: float) -> Bend:
    """Value and closed-form gradient of the mean of ``1 - cos(u, v)``.

    With ``d = v̂ - û``: ``dL/du = -(d + L û)/|u|`` and ``dL/dv = (d - L v̂)/|v|``, which are
    ``-(v̂ - c û)/|u|`` and ``-(û - c v̂)/|v|`` for ``c = û·v̂``, without their cancellation.

    Args:
        u: ``[n, h]``, fp32 or fp64.
        v: Like `u`.
        size_u: ``[n]``, the longest state that u was taken from.
        size_v: The same for v.
        tolerance: Relative length up to which a direction counts for nothing.
    """
    norm_u, norm_v, valid = _measure(u, v, size_u=size_u, size_v=size_v, tolerance=tolerance)
    unit_u, unit_v = u / norm_u.unsqueeze(-1), v / norm_v.unsqueeze(-1)
    gap = unit_v - unit_u
    each = (0.5 * gap.square().sum(-1)).clamp(max=2)
    count = valid.sum().to(u.dtype)
    # All is finite where a length was replaced, so a share of 0 takes it out.
    share = valid.to(u.dtype) / count.clamp(min=1)
    curve, factor = each.unsqueeze(-1), share.unsqueeze(-1)
    grad_u = -(gap + curve * unit_u) / norm_u.unsqueeze(-1) * factor
    grad_v = (gap - curve * unit_v) / norm_v.unsqueeze(-1) * factor
    return Bend((each * share).sum(), count, grad_u, grad_v)


def bend_loss(u: Tensor, v: Tensor, *, size_u: Tensor, size_v: Tensor, tolerance: float) -> Tensor:
    """The loss of `bend` as an ordinary differentiable expression. Arguments as there.

    Returns:
        A scalar in the dtype of `u`.
    """
    *_, valid = _measure(u.detach(), v.detach(), size_u=size_u.detach(), size_v=size_v.detach(), tolerance=tolerance)
    # The inputs of the division are replaced, not its result: autograd's 0 * inf would be NaN otherwise.
    mask, safe = valid.unsqueeze(-1), torch.ones((), dtype=u.dtype, device=u.device)
    gap = _unit(torch.where(mask, v, safe)) - _unit(torch.where(mask, u, safe))
    each = (0.5 * gap.square().sum(-1)).clamp(max=2)
    return torch.where(valid, each, torch.zeros_like(each)).sum() / valid.sum().clamp(min=1)


def _unit(vectors: Tensor) -> Tensor:
    scaled = vectors / _peak(vectors)
    return scaled / scaled.norm(dim=-1, keepdim=True)
