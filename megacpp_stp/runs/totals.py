"""What a metrics record says of speed and of the run so far: TFLOP/s, MFU, goodput, steps that came to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

PEAK_FLOPS: Mapping[str, float] = {
    "H200 NVL": 835.5e12,  # on a PCIe board, with less power
    "H200": 989.5e12,
    "H100 80GB HBM3": 989.5e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s of a GPU whose name has the key, the first that it has (NVIDIA's data sheets, without sparsity)."""


def peak_flops(gpu: str | None) -> float | None:
    """Dense bf16 FLOP/s of a device, by CUDA's name for it; None for a CPU, a part of a GPU, one not listed."""
    if gpu is None or " MIG " in gpu:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one process does for a token.

    Attributes:
        flops_per_token: Of the model, forward and backward, as `megacpp_stp.plan.flops` counts it.
        processes: Of the run.
        peak_flops: Of one process's device; None where it is not known.
    """

    flops_per_token: int
    processes: int
    peak_flops: float | None

    def speed(self, tokens_per_s: float) -> dict[str, float | None]:
        """Model TFLOP/s of one process, and their share of its device's peak (MFU).

        Recomputation is not counted, and the peak is bf16's in each precision: an fp8 run may pass 1.
        """
        flops = self.flops_per_token * tokens_per_s / self.processes
        return {"tflops_per_gpu": flops / 1e12, "mfu": flops / self.peak_flops if self.peak_flops else None}


class Totals:
    """Sums over a run, its earlier attempts included.

    Args:
        started: When the run's first attempt began, ISO 8601 with its zone.
        records: What is in metrics.jsonl: the iterations that this attempt goes on from.
    """

    def __init__(self, *, started: str, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._started = datetime.fromisoformat(started).timestamp()
        self._useful = 0.0
        self._skipped = self._nonfinite = self._in_a_row = 0
        for record in records:
            self._add(record)

    def after(self, record: Mapping[str, Any], *, now: float | None = None) -> dict[str, float | int]:
        """The sums with one more iteration.

        Args:
            record: Of the iteration.
            now: Seconds since the epoch; None for the clock's.

        Returns:
            ``skipped_iterations``; ``nonfinite_iterations``, those of them whose numbers were not finite;
            ``goodput``, the share of the wall time since the run first began that went into
            iterations which count: finished, not skipped, not lost to a restart.
        """
        self._add(record)
        passed = (time.time() if now is None else now) - self._started
        # The clock of `started` is read to the second.
        return {
            "skipped_iterations": self._skipped,
            "nonfinite_iterations": self._nonfinite,
            "goodput": self._useful / max(passed, self._useful, 1e-9),
        }

    @property
    def nonfinite_in_a_row(self) -> int:
        """How many iterations since the last whole step were skipped for numbers that were not finite."""
        return self._in_a_row

    def _add(self, record: Mapping[str, Any]) -> None:
        if record.get("nonfinite"):
            self._nonfinite += 1
            self._in_a_row += 1
        if record.get("skipped"):
            self._skipped += 1
        else:
            self._in_a_row = 0
            self._useful += float(record.get("step_time_s") or 0.0)
