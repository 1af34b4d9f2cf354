"""A backward pass from within a backward pass that stays under the function modes of its thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd import backward as _backward
from torch.autograd.graph import get_gradient_edge


def backward(tensors: Any, grad_tensors: Any = None, *rest: Any, **options: Any) -> None:
    """``torch.autograd.backward``, to whose recomputed layers the function modes are still there.

    torch hands a call with tensors to the mode and leaves the mode until it returns; edges of the graph are no tensors.
    Upstream's recomputation gives sequences of both; any other call is torch's own.
    """
    if isinstance(tensors, Sequence) and isinstance(grad_tensors, Sequence):
        tensors = [get_gradient_edge(tensor) for tensor in tensors]
    _backward(tensors, grad_tensors, *rest, **options)
