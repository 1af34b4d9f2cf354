"""What STP measured in one iteration, reduced over ranks in one fixed shape.

Letters: n taps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_COLUMNS = 5  # sum of weighted losses, sum of weights, readings, valid triples, triples


@dataclass(frozen=True, slots=True)
class StpReading:
    """One iteration's STP, the same on every rank.

    Attributes:
        loss_by_tap: Mean STP loss over microbatches and data ranks, by number of the tap. Under per-token loss each
            microbatch weighs as many as it has tokens that count.
        readings_by_tap: How often each tap was read, over all data and context ranks; 0 means that nothing fed it.
        valid_by_tap: Share of spans that had directions and were allowed.
        valid_fraction: The same over all taps.
    """

    loss_by_tap: dict[int, float]
    readings_by_tap: dict[int, int]
    valid_by_tap: dict[int, float]
    valid_fraction: float

    @property
    def loss(self) -> float:
        """Mean over taps: the raw STP loss."""
        return sum(self.loss_by_tap.values()) / len(self.loss_by_tap)

    @property
    def straightness_by_tap(self) -> dict[int, float]:
        """``1 - loss``, the mean cosine: 1 for straight paths, 0 for right angles."""
        return {tap: 1.0 - loss for tap, loss in self.loss_by_tap.items()}

    def straightness_by_family(self, families: Mapping[int, str]) -> dict[str, float]:
        """Mean straightness of each family's taps.

        Args:
            families: Family of each tap.
        """
        found: dict[str, list[float]] = {}
        for tap, straightness in self.straightness_by_tap.items():
            found.setdefault(families[tap], []).append(straightness)
        return {family: sum(values) / len(values) for family, values in found.items()}


class Meter:
    """Sums of one iteration on this rank. Nothing is read back from the device before `reduce`."""

    def __init__(self, taps: Sequence[int]) -> None:
        self._taps = tuple(taps)
        self._sums: dict[int, Tensor] = {}

    def add(self, tap: int, *, loss: Tensor, valid: Tensor, triples: int, weight: Tensor | None = None) -> None:
        """Add one microbatch at one tap.

        Args:
            tap: Its number.
            loss: Scalar, the mean over valid triples.
            valid: Scalar, how many were valid.
            triples: How many were drawn.
            weight: Scalar, its tokens under per-token loss; microbatches weigh the same when None.
        """
        loss, one = loss.to(torch.float64), torch.ones((), dtype=torch.float64, device=loss.device)
        weight = one if weight is None else weight.to(torch.float64)
        row = torch.stack((loss * weight, weight, one, valid.to(torch.float64), one * triples))
        self._sums[tap] = self._sums[tap] + row if tap in self._sums else row

    def reset(self) -> None:
        """Forget the iteration so far."""
        self._sums.clear()

    def reduce(self, *, device: torch.device, groups: Sequence[dist.ProcessGroup]) -> StpReading:
        """Sum over ranks, and start a new iteration. Every rank must call it, with or without taps of its own.

        Args:
            device: Of the collective.
            groups: Summed over one after the other: the data-parallel group with its context ranks, then the
                pipeline group. Tensor ranks read the same, so they are not summed.
        """
        zero = torch.zeros(_COLUMNS, dtype=torch.float64, device=device)
        table = torch.stack([self._sums.get(tap, zero).to(device) for tap in self._taps])
        self.reset()
        for group in groups:
            dist.all_reduce(table, group=group)
        losses, weights, readings, valid, triples = table.cpu().unbind(1)
        mean = losses / weights.clamp(min=1)
        return StpReading(
            loss_by_tap=dict(zip(self._taps, mean.tolist(), strict=True)),
            readings_by_tap=dict(zip(self._taps, map(int, readings.tolist()), strict=True)),
            valid_by_tap=dict(zip(self._taps, (valid / triples.clamp(min=1)).tolist(), strict=True)),
            valid_fraction=float(valid.sum() / triples.sum().clamp(min=1)),
        )
