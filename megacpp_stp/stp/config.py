"""STP's settings as a run holds them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StpConfig:
    """One run's STP policy.

    Attributes:
        weight: Factor of the mean STP loss over all taps.
        n_spans: Triples a sequence and tap.
        start_step: First iteration, counted from 0, that has the STP gradient.
        taps: Global Megatron layer numbers, rising.
        seed: Key of the triple sampler.
    """

    weight: float
    n_spans: int
    start_step: int
    taps: tuple[int, ...]
    seed: int

    def is_active(self, iteration: int) -> bool:
        """Whether iteration number `iteration` (iterations completed before it) has the STP gradient."""
        return self.weight > 0 and iteration >= self.start_step
