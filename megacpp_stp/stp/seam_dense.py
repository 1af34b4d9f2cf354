"""The seam as compilers see it, and devices on which autograd has no sparse gradients: one dense addition.

Letters: s sequence, b batch, h hidden, m rows of the seam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("megacpp_stp::add_rows", mutates_args=())
def add_rows(grad: Tensor, rows: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """``grad + scale * rows`` at `index`, one operation to a compiler.

    Were it several, a compiler would see that ``rows * scale`` does not need `grad`, and multiply in forward, with
    the scale of an earlier microbatch: schedules set it between the two.

    Args:
        grad: ``[s, b, h]``.
        rows: ``[m, h]``.
        index: ``[m]`` int64 into the ``s * b`` rows of `grad`.
        scale: Scalar.

    Returns:
        A new tensor like `grad`, contiguous.
    """
    addend = (rows * scale).to(grad.dtype)
    return grad.reshape(-1, grad.shape[-1]).index_add(0, index, addend).view(grad.shape)


@add_rows.register_fake
def _(grad: Tensor, rows: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


class _DenseSeam(torch.autograd.Function):
    """Identity forward; backward adds ``rows * scale`` at ``index`` out of place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index, scale)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return add_rows(grad, *ctx.saved_tensors), None, None, None


def inject_dense(hidden: Tensor, rows: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Pass `hidden` through unchanged and add ``scale * rows`` to its gradient in backward, out of place.

    Args:
        hidden: ``[s, b, h]``.
        rows: ``[m, h]``, no two of them other than 0 at the same position.
        index: ``[m]`` int64 into the ``s * b`` rows of `hidden`.
        scale: Scalar; what it holds when backward runs counts.

    Returns:
        A view of `hidden`.
    """
    return _DenseSeam.apply(hidden, rows, index, scale)
