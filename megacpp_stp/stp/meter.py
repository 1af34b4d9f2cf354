"""What STP measured in one iteration, reduced over ranks in one fixed shape.

Letters: n taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_COLUMNS = 5  # sum of weighted losses, sum of weights, readings, valid triples, triples


@dataclass(frozen=True, slots=True)
class StpReading:
    """One iteration's STP, the same on every rank.

    Attributes:
        loss_by_tap: Mean STP loss over the microbatches of all data ranks in which any span counted, by number of the
            tap; None when there was none. Under per-token loss each weighs as many as it has tokens that count.
        readings_by_tap: How often each tap was read, over all data and context ranks; 0 means that nothing fed it.
        valid_by_tap: Share of spans that had directions and were allowed.
        valid_fraction: The same over all taps.
    """

    loss_by_tap: dict[int, float | None]
    readings_by_tap: dict[int, int]
    valid_by_tap: dict[int, float]
    valid_fraction: float

    @property
    def loss(self) -> float | None:
        """Mean over the taps that have one: the raw STP loss."""
        return _mean(self.loss_by_tap.values())

    @property
    def straightness_by_tap(self) -> dict[int, float | None]:
        """``1 - loss``, the mean cosine: 1 for straight paths, 0 for right angles."""
        return {tap: None if loss is None else 1.0 - loss for tap, loss in self.loss_by_tap.items()}

    def straightness_by_family(self, families: Mapping[int, str]) -> dict[str, float | None]:
        """Mean straightness of each family's taps.

        Args:
            families: Family of each tap.
        """
        found: dict[str, list[float | None]] = {}
        for tap, straightness in self.straightness_by_tap.items():
            found.setdefault(families[tap], []).append(straightness)
        return {family: _mean(values) for family, values in found.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
        # The loss of a microbatch without a span that counts is 0 by definition, and would pass for straightness.
        weight = weight * ((valid > 0) | loss.isnan())
        row = torch.stack((loss * weight, weight, one, valid.to(torch.float64), one * triples))
        self._sums[tap] = self._sums[tap] + row if tap in self._sums else row

    def nonfinite(self) -> tuple[int, ...]:
        """The taps that read a loss on this rank which is no finite number; waits for the device."""
        if not self._sums:
            return ()
        finite = torch.stack(list(self._sums.values())).isfinite().all(dim=1).tolist()
        return tuple(tap for tap, fine in zip(self._sums, finite, strict=True) if not fine)

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
        sums = zip(losses.tolist(), weights.tolist(), strict=True)
        return StpReading(
            loss_by_tap=dict(
                zip(self._taps, (loss / weight if weight else None for loss, weight in sums), strict=True)
            ),
            readings_by_tap=dict(zip(self._taps, map(int, readings.tolist()), strict=True)),
            valid_by_tap=dict(zip(self._taps, (valid / triples.clamp(min=1)).tolist(), strict=True)),
            valid_fraction=float(valid.sum() / triples.sum().clamp(min=1)),
        )
