"""Parameters that stay fp32 in a model of 16-bit floats.

Megatron's Float16Module casts the whole model with ``module.half()`` or ``module.bfloat16()``, before DDP sorts
parameters into buffers by their dtype and the optimizer decides by it which of them need an fp32 copy.  So the cast
is the one place where a parameter's dtype is settled, and every cast goes through ``torch.nn.Module._apply``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


class KeepsFp32(torch.nn.Module):
    """A module of which some own parameters are never cast to fewer bits than fp32.

    Their values are untouched, not rounded and restored.  Moves to another device and casts to fp64 go through.

    Attributes:
        fp32_parameters: Their names; of parameters of the module itself, not of a submodule.
    """

    fp32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``.to()``, ``.half()``, ``.cuda()`` and their like call, with the cast they make."""
        parameters = [self.get_parameter(name) for name in self.fp32_parameters]
        kept = {id(tensor) for parameter in parameters for tensor in (parameter, parameter.grad)}

        def apply_but_keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) in kept and torch.finfo(applied.dtype).bits < torch.finfo(torch.float32).bits:
                return tensor.to(device=applied.device)
            return applied

        return super()._apply(apply_but_keep, recurse)
