"""The STP objective on gathered rows: value, closed-form gradient, and a differentiable form.

Letters: B/b batch, T/s sequence, D/h hidden, L layers, K spans a sequence, n = K * b triples.
Rows are always ``[3, n, h]``: the states at s, r and t of each triple.

Source of the formula: arXiv 2602.22617, ``1 - cos(h_t - h_r, h_r - h_s)``. Everything is computed in fp32 at
least: in bf16 the cosine alone is quantised to 1/256 near its ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megacpp_stp.errors import UserError


class StpTerms(NamedTuple):
    """STP of a set of triples.

    Attributes:
        loss: Scalar, the mean of ``1 - cos`` over valid triples; 0 when none is valid.
        valid: Scalar, the number of valid triples, in the loss's dtype.
        grad: ``[3, n, h]``, d loss / d rows.
    """

    loss: Tensor
    valid: Tensor
    grad: Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _directions(rows: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, v with degenerate ones replaced by a harmless direction, their norms, and the mask of valid triples.

    A direction is degenerate when it is not longer than `tolerance` times the longer of its two states: then it is
    the states' rounding error and says nothing. Masked *before* the division, so that neither value nor gradient
    sees it. A NaN compares false, stays valid, and so reaches the loss instead of hiding.
    """
    h_s, h_r, h_t = rows
    u, v = h_r - h_s, h_t - h_r
    size_s, size_r, size_t = (h.norm(dim=-1) for h in (h_s, h_r, h_t))
    norm_u, norm_v = u.norm(dim=-1), v.norm(dim=-1)
    degenerate = (norm_u <= tolerance * torch.maximum(size_s, size_r)) | (
        norm_v <= tolerance * torch.maximum(size_r, size_t)
    )
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    norm_u, norm_v = torch.where(degenerate, one, norm_u), torch.where(degenerate, one, norm_v)
    return u, v, norm_u, norm_v, ~degenerate


@torch.no_grad()
def stp_terms(rows: Tensor, *, tolerance: float) -> StpTerms:
    """Value and closed-form gradient of the mean STP loss.

    With ``u = h_r - h_s``, ``v = h_t - h_r``, unit vectors ``û, v̂`` and ``c = û·v̂``:
    ``g_s = (v̂ - c û)/|u|``, ``g_t = -(û - c v̂)/|v|``, ``g_r = -(g_s + g_t)``.

    Args:
        rows: ``[3, n, h]``, fp32 or fp64.
        tolerance: Relative length below which a direction counts for nothing; the machine epsilon of the dtype
            that the states were stored in.

    Returns:
        StpTerms in the dtype of `rows`.
    """
    u, v, norm_u, norm_v, valid = _directions(rows, tolerance)
    unit_u, unit_v = u / norm_u.unsqueeze(-1), v / norm_v.unsqueeze(-1)
    cosine = (unit_u * unit_v).sum(-1)
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    count = valid.sum().to(rows.dtype)
    share = valid.to(rows.dtype) / count.clamp(min=1)
    loss = (torch.where(valid, 1 - cosine, zero) * share).sum()
    c = cosine.unsqueeze(-1)
    grad_s = (unit_v - c * unit_u) / norm_u.unsqueeze(-1)
    grad_t = -(unit_u - c * unit_v) / norm_v.unsqueeze(-1)
    grad = torch.stack((grad_s, -(grad_s + grad_t), grad_t)) * share.unsqueeze(-1)
    return StpTerms(loss, count, torch.where(valid.unsqueeze(-1), grad, zero))


def stp_loss_of_rows(rows: Tensor, *, tolerance: float) -> Tensor:
    """The mean STP loss of ``[3, n, h]`` rows as an ordinary differentiable expression.

    Returns:
        A scalar in the dtype of `rows`; 0 when no triple is valid.
    """
    h_s, h_r, h_t = rows
    *_, valid = _directions(rows.detach(), tolerance)
    # The inputs of the division are replaced, not its result: autograd's 0 * inf would be NaN otherwise.
    safe = torch.ones((), dtype=rows.dtype, device=rows.device)
    u = torch.where(valid.unsqueeze(-1), h_r - h_s, safe)
    v = torch.where(valid.unsqueeze(-1), h_t - h_r, safe)
    cosine = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    terms = torch.where(valid, 1 - cosine, torch.zeros((), dtype=rows.dtype, device=rows.device))
    return terms.sum() / valid.sum().clamp(min=1)


def random_triples(length: int, count: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``[3, count]`` int64 positions s < r < t, uniform over all triples of ``range(length)``.

    Args:
        length: At least 3.
        count: Number of triples.
        generator: Source of randomness; the default generator of `device` when None.
        device: Where to draw.
    """

    def draw(size: int) -> Tensor:
        return torch.randint(0, size, (count,), generator=generator, device=device)

    return distinct_sorted(draw(length), draw(length - 1), draw(length - 2))


def distinct_sorted(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Three draws from U[0, T), U[0, T-1), U[0, T-2) to three distinct positions, sorted; exactly uniform.

    The later draws skip what is taken, so no triple is rejected or clamped and shapes stay static.

    Args:
        a: int64, any shape.
        b: Like `a`.
        c: Like `a`.

    Returns:
        ``[3, *a.shape]``.
    """
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    return torch.stack((a, b, c)).sort(dim=0).values


def compute_stp_loss(
    hidden: Tensor | Sequence[Tensor], *, n_spans: int, generator: torch.Generator | None = None
) -> Tensor:
    """The STP loss of hidden states, differentiable.

    Variant A: one tensor, ``n_spans=1``. Variant B: one tensor, more spans. Variant C: a list of tensors, one for
    each supervised layer; the result is the mean over the list.

    Args:
        hidden: ``(B, T, D)`` floating point, or a non-empty list of such. Rows are gathered first and only those
            are computed with, in fp32 (fp64 stays fp64).
        n_spans: Triples a sequence.
        generator: Draws the triples; torch's default generator when None.

    Returns:
        A scalar, fp32 or fp64. Exactly 0, without a gradient, when T < 3: there is no triple. NaN in a sampled
        row gives NaN.

    Raises:
        UserError: An empty list, ``n_spans < 1``, or a tensor that is not ``(B, T, D)``. A list that nobody filled
            must not read as a perfect loss.
    """
    if n_spans < 1:
        raise UserError("must be at least 1", field="n_spans", value=n_spans, fix="draw one triple or more")
    layers = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    if not layers:
        raise UserError("no hidden states were collected", field="hidden", fix="pass at least one (B, T, D) tensor")
    losses = [_loss_of_layer(layer, n_spans, generator) for layer in layers]
    return torch.stack(losses).mean()


def _loss_of_layer(hidden_btd: Tensor, n_spans: int, generator: torch.Generator | None) -> Tensor:
    if hidden_btd.dim() != 3 or not hidden_btd.is_floating_point():
        shown = f"{tuple(hidden_btd.shape)} {hidden_btd.dtype}"
        raise UserError("is not a floating-point (B, T, D) tensor", field="hidden", value=shown, fix="pass (B, T, D)")
    batch, length, _ = hidden_btd.shape
    dtype = _compute_dtype(hidden_btd.dtype)
    if length < 3:
        return torch.zeros((), dtype=dtype, device=hidden_btd.device)
    triples = random_triples(length, n_spans * batch, generator=generator, device=hidden_btd.device)
    first_row = torch.arange(batch, device=hidden_btd.device).repeat(n_spans) * length
    rows = hidden_btd.reshape(batch * length, -1).index_select(0, (triples + first_row).reshape(-1))
    rows = rows.to(dtype).reshape(3, n_spans * batch, -1)
    return stp_loss_of_rows(rows, tolerance=torch.finfo(hidden_btd.dtype).eps)
