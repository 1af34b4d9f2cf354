"""The gradient seam: forward is the identity, backward adds rows to the passing gradient.

Letters: s sequence, b batch, h hidden, m rows of the seam (3 * spans * b).

The seam keeps `[m, h]` rows and `[m]` indices alive, never a tensor of the sequence's size, and there is no autograd
graph from the loss to the hidden state: the auxiliary gradient joins the main one where it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.stp.seam_dense import inject_dense

_SPARSE_DEVICES = ("cpu", "cuda")

Observer = Callable[[Tensor, Tensor], None]
"""Takes the squared size of the gradient that arrives and that of what is added to it: 0-dim fp64 tensors."""


class GradScale:
    """The factor that turns d(loss of one microbatch) into its part of the step's gradient.

    megatron-core's schedules set it after each forward step of each stage (see `megacpp_stp.stp.scale`); the seam
    reads it in backward. The tensor is updated in place, so that a captured CUDA graph sees the change.

    Args:
        device: Where the value will be; a wrong one costs a compiled step one more compilation.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # NaN, so that a graph that was compiled before the first `set` cannot pass for one that has a scale.
        self._value = torch.full((), torch.nan, device=device)
        self._known = False

    def set(self, value: Tensor) -> None:
        """Take over a scalar or size-1 tensor."""
        value = value.detach().reshape(())
        self._known = True
        if self._value.device != value.device:
            self._value = value.to(torch.float32).clone()
        else:
            # Past the version counter: a compiled graph that saved the tensor reads what it holds by then.
            self._value.data.copy_(value)

    def get(self) -> Tensor:
        """The current factor, a 0-dim fp32 tensor.

        Raises:
            UserError: Nothing has set it: the schedule in use does not call the hook.
        """
        if not self._known:
            raise UserError(
                "the pipeline schedule never set the STP gradient scale",
                field="stp",
                fix="use megatron-core's own schedules, 0.19 or newer",
            )
        return self._value

    @property
    def tensor(self) -> Tensor:
        """What `set` writes to as long as it is handed tensors of one device; NaN before it."""
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
    """Identity forward; backward adds ``rows * scale`` at ``index``, in place where nobody else holds the gradient.

    The hidden state enters twice, so that backward may answer with two gradients: the rows, as a sparse tensor, and
    the passing one as it came. Autograd sums them (torch/csrc/autograd/input_buffer.cpp, `accumulate`): into the
    later one if that is contiguous and neither it nor its storage has another holder, as it has when a residual
    branch is yet to read it; into a new tensor otherwise. So the rows come first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        again: Tensor,
        rows: Tensor,
        index: Tensor,
        scale: GradScale,
        observer: Observer | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, index)
        ctx.scale = scale
        ctx.observer = observer
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, index = ctx.saved_tensors
        addend = (rows * ctx.scale.get()).to(grad.dtype)
        if ctx.observer is not None:
            ctx.observer(_squared_size(grad), _squared_size(addend))
        where = torch.stack((index // grad.shape[1], index % grad.shape[1]))
        # Checking the positions would wait for the device.
        sparse = torch.sparse_coo_tensor(where, addend, grad.shape, check_invariants=False)
        # On a GPU a sparse tensor can only be added to a contiguous one.
        return sparse, grad.contiguous(), None, None, None, None


def _squared_size(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def inject(
    hidden: Tensor, rows: Tensor, index: Tensor, scale: GradScale, *, observer: Observer | None = None
) -> Tensor:
    """Pass `hidden` through unchanged and add ``scale * rows`` to its gradient in backward.

    Args:
        hidden: ``[s, b, h]``.
        rows: ``[m, h]`` fp32 (fp64 for fp64 states), the auxiliary gradient without the schedule's scale.
        index: ``[m]`` int64 into the ``s * b`` rows of `hidden`; duplicates are summed.
        scale: Read when backward runs.
        observer: Called in backward; one more pass over the gradient. None for none.

    Returns:
        A tensor equal to `hidden` bit for bit. It is a view: where Megatron frees stage outputs, the stack's own
        `make_viewless_tensor` at its end takes care of it.
    """
    rows = coalesce(rows, index)
    if torch.compiler.is_compiling() or hidden.device.type not in _SPARSE_DEVICES:
        assert observer is None, "observed in eager mode on a CPU or CUDA device alone"
        return inject_dense(hidden, rows, index, scale.tensor)
    return _Seam.apply(hidden, hidden, rows, index, scale, observer)
