"""What the Mamba-3 recurrence reads.

Legend: s sequence, b batch, H heads, P channels of a head, G groups (each serves H / G consecutive heads), N state
channels, S rotated pairs of state channels, R inputs and outputs of a head at each step (MIMO).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanInputs:
    """One sequence's inputs to the recurrence; see `reference_scan` for what it does with them.

    With one input and output of a head (SISO), B, C and their biases have no dimension R, and the last three are
    None; with several (MIMO), see `reference_mimo_scan`.

    Attributes:
        x: [s, b, H, P], what is written to the state.
        z: [s, b, H, P], the output gate before its SiLU.
        B: [s, b, G, N] or [s, b, G, R, N], where it is written (a key), already normalised.
        C: [s, b, G, N] or [s, b, G, R, N], where the state is read (a query), already normalised.
        dt: [s, b, H], step size, positive.
        log_decay: [s, b, H], ``A * dt``, not positive.
        trap: [s, b, H], weight of a step's own end point in the trapezoidal rule, in [0, 1].
        B_bias: [H, N] or [H, R, N], added to B after the norm, per head.
        C_bias: [H, N] or [H, R, N], added to C after the norm, per head.
        D: [H], weight of the skip connection.
        angle: [s, b, S], rotation rates before their tanh, the same for all heads; None for no rotation.
        mimo_x: [H, R, P], what makes R inputs of x.
        mimo_z: [H, R, P], what makes R gates of z.
        mimo_o: [H, R, P], the weights of the R gated outputs in their sum.
    """

    x: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    log_decay: Tensor
    trap: Tensor
    B_bias: Tensor
    C_bias: Tensor
    D: Tensor
    angle: Tensor | None = None
    mimo_x: Tensor | None = None
    mimo_z: Tensor | None = None
    mimo_o: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the state and of all arithmetic: fp32, or fp64 when x is fp64."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name; without those that are None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Self:
        """The same inputs, all of them cast."""
        return replace(self, **{name: tensor.to(dtype) for name, tensor in self.tensors().items()})
