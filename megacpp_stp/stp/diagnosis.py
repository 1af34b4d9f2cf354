"""Whether straightness is bought by collapse or by a clock, and how hard STP pulls: measured now and then.

* Effective rank (Roy and Vetterli, EUSIPCO 2007): exp of the entropy of the singular values, normalised to sum 1, of
  centred states at evenly spaced positions. States that collapse to a line have 1.
* Clock share: a drift that all sequences have in common, by position alone, straightens paths and says nothing about
  their content. The states of each sequence are projected off the mean step from first to last sampled position of
  all *other* sequences of the iteration, and the loss is measured again at the same spans: from L to L'. The share is
  ``(L' - L) / (L0 - L)``, of what straightness there is beyond that of independent points, L0. 0: the drift explains
  nothing; 1: without it the states are as bent as independent points; above 1 or below 0 where it is something else
  than straightness. No number unless L is 0.05 below L0, nor with one sequence an iteration.
* Gradient share: size of the STP gradient at the tap over that of all gradient that arrives there from later layers.

Letters: p positions of a sequence on this rank, s of the whole of it, b batch, h hidden, m points a span, n spans,
w sampled positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.spans import span_terms

SAMPLED_STATES = 256  # of one microbatch, for the effective rank
_LEAST_STRAIGHTNESS = 0.05  # beyond that of independent points; the share of less is noise
_INDEPENDENT_POINTS = {"triple": 1.5, "chord": 1.0 + 1.0 / math.sqrt(2.0)}


@dataclass(frozen=True, slots=True)
class TapDiagnosis:
    """One tap in one iteration; see the top of this module. None for what cannot be said."""

    effective_rank: float | None
    clock_share: float | None
    gradient_share: float | None


class _Sample(NamedTuple):
    """What one microbatch leaves until the drift of all sequences is known."""

    rows: Tensor  # [m, n, h]
    allowed: Tensor | None  # [n]
    steps: Tensor  # [b, h]
    tolerance: float


class Diagnosis:
    """Sums of one diagnosed iteration on this rank.

    Args:
        config: The run's STP policy.
        hidden_size: h.
        copies: Ranks that hold the same sampled rows and are summed over: the context-parallel size.
        shard_group: Ranks that hold parts of one microbatch's states and are *not* summed over by the meter: the
            tensor-parallel group under sequence parallelism; None without.
    """

    def __init__(
        self, config: StpConfig, *, hidden_size: int, copies: int = 1, shard_group: dist.ProcessGroup | None = None
    ) -> None:
        self._config = config
        self._hidden_size = hidden_size
        self._copies = copies
        self._shard_group = shard_group
        self._samples: dict[int, list[_Sample]] = {}
        self._ranks: dict[int, list[Tensor]] = {}
        self._squares: dict[int, Tensor] = {}

    def positions(self, *, length: int, batch: int, device: torch.device) -> Tensor:
        """Evenly spaced positions, the first and the last among them: ``[w, 1, b]`` int64, as spans are."""
        count = max(2, min(length, SAMPLED_STATES // batch))
        each = torch.arange(count, device=device) * (length - 1) // (count - 1)
        return each.view(-1, 1, 1).expand(-1, 1, batch)

    def add_states(
        self, tap: int, *, states: Tensor, rows: Tensor, allowed: Tensor | None, tolerance: float, rank: bool
    ) -> None:
        """Add one microbatch at one tap.

        Args:
            tap: Its number.
            states: ``[w, b, h]`` at `positions`.
            rows: ``[m, n, h]``, what the objective was computed on.
            allowed: ``[n]`` bool; None for all.
            tolerance: Of the objective.
            rank: Whether to measure the effective rank too: one microbatch says enough.
        """
        self._samples.setdefault(tap, []).append(_Sample(rows, allowed, states[-1] - states[0], tolerance))
        if rank:
            self._ranks.setdefault(tap, []).append(effective_rank(states.flatten(0, 1)))

    def add_gradient(self, tap: int, arriving: Tensor, added: Tensor) -> None:
        """Add the squared sizes of one microbatch's gradients at one tap, 0-dim fp64, on this rank's positions."""
        pair = torch.stack((added, arriving))
        self._squares[tap] = self._squares[tap] + pair if tap in self._squares else pair

    def reset(self) -> None:
        """Forget the iteration so far."""
        self._samples.clear()
        self._ranks.clear()
        self._squares.clear()

    def reduce(self, *, device: torch.device, groups: Sequence[dist.ProcessGroup]) -> dict[int, TapDiagnosis]:
        """Put the ranks together, by tap, and start anew. Every rank must call it, with or without taps of its own.

        Args:
            device: Of the collectives.
            groups: As in `megacpp_stp.stp.meter.Meter.reduce`.
        """
        drift = self._drift(device, groups)
        table = torch.stack([self._row(tap, drift[i]).to(device) for i, tap in enumerate(self._config.taps)])
        squares = torch.stack(
            [self._squares.get(tap, torch.zeros(2, dtype=torch.float64)).to(device) for tap in self._config.taps]
        )
        self.reset()
        for group in groups:
            dist.all_reduce(table, group=group)
            dist.all_reduce(squares, group=group)
        if self._shard_group is not None:
            dist.all_reduce(squares, group=self._shard_group)
        lines = zip(self._config.taps, table.tolist(), squares.tolist(), strict=True)
        return {tap: self._say(row, square) for tap, row, square in lines}

    def _drift(self, device: torch.device, groups: Sequence[dist.ProcessGroup]) -> Tensor:
        """``[taps, h + 1]``: summed steps of all sequences, and their number."""
        total = torch.zeros(len(self._config.taps), self._hidden_size + 1, dtype=torch.float64, device=device)
        for i, tap in enumerate(self._config.taps):
            for sample in self._samples.get(tap, ()):
                total[i, :-1] += sample.steps.sum(0) / self._copies
                total[i, -1] += sample.steps.shape[0] / self._copies
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    def _row(self, tap: int, drift: Tensor) -> Tensor:
        """Sums of the loss with and without the drift, their number, of effective ranks, and theirs."""
        row = torch.zeros(5, dtype=torch.float64, device=drift.device)
        for sample in self._samples.get(tap, ()):
            others = drift[:-1] - sample.steps
            rows = without_direction(sample.rows, others.to(sample.rows.dtype))
            with_drift, without = (
                span_terms(self._config, each, tolerance=sample.tolerance, allowed=sample.allowed)
                for each in (sample.rows, rows)
            )
            counts = (with_drift.valid > 0).to(torch.float64)
            row[0] += counts * with_drift.loss
            # One sequence has no others.
            row[1] += torch.where(drift[-1] > 1.5, counts * without.loss, torch.nan)
            row[2] += counts
        for rank in self._ranks.get(tap, ()):
            row[3] += rank
            row[4] += 1
        return row

    def _say(self, row: Sequence[float], squares: Sequence[float]) -> TapDiagnosis:
        with_drift, without, losses, rank, ranks = row
        added, arriving = squares
        clock = None
        if losses and math.isfinite(without):
            beyond = _INDEPENDENT_POINTS[self._config.objective] - with_drift / losses
            clock = (without - with_drift) / losses / beyond if beyond >= _LEAST_STRAIGHTNESS else None
        return TapDiagnosis(
            effective_rank=rank / ranks if ranks and math.isfinite(rank) else None,
            clock_share=clock,
            gradient_share=math.sqrt(added / arriving) if arriving > 0 and added > 0 else None,
        )


@torch.no_grad()
def effective_rank(states: Tensor) -> Tensor:
    """Effective rank of ``[w, h]`` states around their mean: a scalar from 1 to ``min(w - 1, h)``, fp64.

    By the eigenvalues of the w by w products, so that it costs little for wide states. 1 for states that are equal, NaN
    where one is not finite.
    """
    centred = states.to(torch.float64) - states.to(torch.float64).mean(0)
    finite = centred.isfinite().all()
    centred = torch.where(finite, centred, 0)  # the solver would raise
    size = torch.linalg.eigvalsh(centred @ centred.T).clamp(min=0).sqrt()
    # Roots of rounding errors would count as directions.
    size = torch.where(size > size.max() * states.shape[0] * torch.finfo(torch.float64).eps ** 0.5, size, 0)
    share = size / size.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(finite, torch.exp(-torch.special.xlogy(share, share).sum()), torch.nan)


def reference_effective_rank(states: Tensor) -> Tensor:
    """The same by singular values of the states: the truth for `effective_rank`."""
    size = torch.linalg.svdvals(states.to(torch.float64) - states.to(torch.float64).mean(0))
    share = size[size > 0] / size.sum()
    return torch.exp(-(share * share.log()).sum())


def without_direction(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows ``[m, n, h]`` projected off one direction ``[b, h]`` for each sequence, where ``n = K * b``, b last.

    A direction of length 0 takes nothing away.
    """
    points, _, width = rows.shape
    unit = torch.nn.functional.normalize(direction, dim=1, eps=torch.finfo(rows.dtype).tiny)
    apart = rows.view(points, -1, direction.shape[0], width)
    along = (apart * unit).sum(-1, keepdim=True)
    return (apart - along * unit).view_as(rows)
