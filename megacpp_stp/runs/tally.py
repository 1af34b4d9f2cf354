"""What the iterations of a run come to so far: the part of a receipt that grows while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from megacpp_stp.runs.gate import ACTIVE, DORMANT, WARMING
from megacpp_stp.runs.metrics import last_of


class Tally:
    """Counts and sums over the iterations of a run, those before a restart included.

    Args:
        started: When the run's first attempt began, ISO 8601 with its zone.
        weight: STP's whole weight; None for a run without STP.
        records: Of metrics.jsonl, as far as they are there already.
    """

    def __init__(self, *, started: str, weight: float | None, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._started = datetime.fromisoformat(started).timestamp()
        self._weight = weight
        self._last: Mapping[str, Any] = {}
        names = ("iterations", "tokens", "loss_tokens", "skipped_iterations", "nonfinite_iterations")
        self._counts = dict.fromkeys(names, 0)
        self._training = self._useful = 0.0
        self._regimes = dict.fromkeys((DORMANT, WARMING, ACTIVE), 0)
        self._without_a_span = 0
        for record in records:
            self.add(record)

    @property
    def iterations_done(self) -> int:
        """Number of the last iteration; 0 before the first."""
        return int(self._last.get("iteration", 0))

    def add(self, record: Mapping[str, Any]) -> None:
        """One more iteration."""
        self._last = record
        skipped = bool(record.get("skipped"))
        self._counts["iterations"] += 1
        for name in ("tokens", "loss_tokens"):
            count = record.get(name)
            self._counts[name] += count if type(count) is int else 0
        self._counts["skipped_iterations"] += skipped
        self._counts["nonfinite_iterations"] += bool(record.get("nonfinite"))
        step = float(record.get("step_time_s") or 0.0)
        self._training += step
        self._useful += 0.0 if skipped else step
        if self._weight is not None and "stp_active" in record:
            self._regimes[self._regime(record)] += 1
            self._without_a_span += record.get("stp_loss") is None and not record.get("nonfinite")

    def _regime(self, record: Mapping[str, Any]) -> str:
        """By what the iteration says that it did, not by the schedule."""
        if not record["stp_active"]:
            return DORMANT
        return ACTIVE if record.get("stp_weight", self._weight) == self._weight else WARMING

    def facts(self, *, now: float | None = None) -> dict[str, Any]:
        """For a receipt.

        Args:
            now: Seconds since the epoch; None for the clock's.

        Returns:
            ``iterations_done``, ``last``, ``totals`` and ``stp_iterations``, as docs/receipt.schema.json has them.
        """
        wall = max((time.time() if now is None else now) - self._started, 0.0)
        # The clock of `started` is read to the second.
        goodput = self._useful / max(wall, self._useful) if self._useful else 0.0
        times = {"training_time_s": self._training, "wall_time_s": wall, "goodput": goodput}
        regimes = None if self._weight is None else {**self._regimes, "without_a_span": self._without_a_span}
        return {
            "iterations_done": self.iterations_done,
            "last": last_of(dict(self._last)),
            "totals": {**self._counts, **times},
            "stp_iterations": regimes,
        }


def tally_of(receipt: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Tally:
    """The tally of a run by its receipt and its records."""
    stp = receipt["auxiliary_losses"]["stp"]
    return Tally(started=receipt["started"], weight=None if stp is None else stp["weight"], records=records)
