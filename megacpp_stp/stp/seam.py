"""The gradient seam: forward is the identity, backward adds rows to the passing gradient.

Letters: s sequence, b batch, h hidden, m rows of the seam (3 * spans * b).

The seam keeps `[m, h]` rows and `[m]` indices alive, never a tensor of the sequence's size, and there is no autograd
graph from the loss to the hidden state: the auxiliary gradient joins the main one where it passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacpp_stp.errors import UserError


class GradScale:
    """The factor that turns d(loss of one microbatch) into its part of the step's gradient.

    megatron-core's schedules set it after each forward step of each stage (see `megacpp_stp.stp.scale`); the seam
    reads it in backward. The tensor is updated in place, so that a captured CUDA graph sees the change.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def set(self, value: Tensor) -> None:
        """Take over a scalar or size-1 tensor."""
        value = value.detach().reshape(())
        if self._value is None or self._value.device != value.device:
            self._value = value.to(torch.float32).clone()
        else:
            self._value.copy_(value)

    def get(self) -> Tensor:
        """The current factor, a 0-dim fp32 tensor.

        Raises:
            UserError: Nothing has set it: the schedule in use does not call the hook.
        """
        if self._value is None:
            raise UserError(
                "the pipeline schedule never set the STP gradient scale",
                field="stp",
                fix="use megatron-core's own schedules, 0.19 or newer",
            )
        return self._value


def coalesce(rows: Tensor, index: Tensor) -> Tensor:
    """Sum the rows of equal index into the first of them and zero the others.

    Then adding them to the gradient gives the same bits in any order, on a GPU too, and a position that several
    triples share is summed in fp32 before it meets a bf16 gradient.

    Args:
        rows: ``[m, h]`` fp32 or fp64.
        index: ``[m]`` int64.

    Returns:
        ``[m, h]``.
    """
    equal = index.unsqueeze(0) == index.unsqueeze(1)
    is_first = ~torch.tril(equal, diagonal=-1).any(dim=1)
    # In fp64: a GPU may be allowed TF32 for fp32 products, and m is a few hundred at most.
    chosen = (equal & is_first.unsqueeze(1)).to(torch.float64)
    return (chosen @ rows.to(torch.float64)).to(rows.dtype)


class _Seam(torch.autograd.Function):
    """Identity forward; backward adds ``rows * scale`` at ``index``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, index: Tensor, scale: GradScale) -> Tensor:
        ctx.save_for_backward(rows, index)
        ctx.scale = scale
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, index = ctx.saved_tensors
        addend = (rows * ctx.scale.get()).to(grad.dtype)
        # Out of place: a residual branch may hold the very same gradient tensor.
        flat = grad.reshape(-1, grad.shape[-1]).index_add(0, index, addend)
        return flat.view(grad.shape), None, None, None


def inject(hidden: Tensor, rows: Tensor, index: Tensor, scale: GradScale) -> Tensor:
    """Pass `hidden` through unchanged and add ``scale * rows`` to its gradient in backward.

    Args:
        hidden: ``[s, b, h]``.
        rows: ``[m, h]`` fp32 (fp64 for fp64 states), the auxiliary gradient without the schedule's scale.
        index: ``[m]`` int64 into the ``s * b`` rows of `hidden`; duplicates are summed.
        scale: Read when backward runs.

    Returns:
        A tensor equal to `hidden` bit for bit. It is a view: where Megatron frees stage outputs, the stack's own
        `make_viewless_tensor` at its end takes care of it.
    """
    return _Seam.apply(hidden, coalesce(rows, index), index, scale)
