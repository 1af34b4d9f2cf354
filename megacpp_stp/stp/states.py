"""Hidden states on their way into an objective: checked, and only the sampled rows gathered.

Letters: B/b batch, T/s sequence, D/h hidden, K spans a sequence, m points a span (3 or 4), n = K * b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megacpp_stp.errors import UserError


def checked_layers(hidden: Tensor | Sequence[Tensor], *, n_spans: int) -> list[Tensor]:
    """The hidden states as a list of layers.

    Raises:
        UserError: An empty list, a tensor that is not three-dimensional floating point of some width, or
            ``n_spans < 1``. A list that nobody filled must not read as a perfect loss.
    """
    if n_spans < 1:
        raise UserError("must be at least 1", field="n_spans", value=n_spans, fix="draw one span or more")
    layers = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    if not layers:
        raise UserError("no hidden states were collected", field="hidden", fix="pass at least one (B, T, D) tensor")
    for layer in layers:
        if layer.dim() != 3 or not layer.is_floating_point() or layer.shape[2] == 0:
            raise UserError(
                "is not a floating-point (B, T, D) tensor",
                field="hidden",
                value=f"{tuple(layer.shape)} {layer.dtype}",
                fix="pass (B, T, D), or [s, b, h] with sequence_first=True",
            )
    return layers


def batch_and_length(hidden: Tensor, *, sequence_first: bool) -> tuple[int, int]:
    """Sequences, and positions of each, of ``(B, T, D)`` or, with `sequence_first`, ``[s, b, h]``."""
    return (hidden.shape[1], hidden.shape[0]) if sequence_first else (hidden.shape[0], hidden.shape[1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an objective computes in for states of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_rows(hidden: Tensor, positions: Tensor, *, sequence_first: bool) -> Tensor:
    """The states at the sampled positions, differentiable.

    Cast after the gather, so that nothing of the sequence's size is made, and indexed in place, so that a
    transposed view is not copied. Backward keeps the positions only, and sums rows that are read twice.

    Args:
        hidden: ``(B, T, D)``, or ``[s, b, h]`` with `sequence_first`; any strides.
        positions: ``[m, K, b]`` int64.
        sequence_first: The layout of `hidden`.

    Returns:
        ``[m, n, h]`` in fp32, fp64 for fp64 states.
    """
    sequence = torch.arange(positions.shape[2], device=positions.device).expand_as(positions)
    rows = hidden[positions, sequence] if sequence_first else hidden[sequence, positions]
    return rows.to(compute_dtype(hidden.dtype)).flatten(1, 2)


def only_allowed(rows: Tensor, allowed: Tensor | None) -> Tensor:
    """Rows ``[m, n, h]`` with 0 for all points of the spans that `allowed` (``[n]`` bool) rules out.

    Zero rows have no direction, so an objective drops them, forward and backward.
    """
    if allowed is None:
        return rows
    return torch.where(allowed.reshape(1, -1, 1), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def generator_words(
    count: int, *, n_spans: int, batch: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """``[count, K, b]`` random words of 62 bits from torch's `generator`, the default one when None."""
    return torch.randint(0, 2**62, (count, n_spans, batch), generator=generator, device=device)
