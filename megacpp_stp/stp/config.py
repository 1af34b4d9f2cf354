"""STP's settings as a run holds them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FINAL_NORM = 0
"""The number of the tap after the final norm; layers count from 1."""
_FINAL_NORM_NAME = "final-norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class StpConfig:
    """One run's STP policy.

    Attributes:
        weight: Factor of the mean STP loss over all taps.
        n_spans: Triples a sequence and tap; patches for the chord objective.
        start_step: First iteration, counted from 0, that has the STP gradient.
        taps: Global Megatron layer numbers, or `FINAL_NORM`; no two alike.
        seed: Key of the triple sampler.
        objective: ``triple``, see `megacpp_stp.stp.objective`, or ``chord``, see `megacpp_stp.stp.chord`.
        max_span: Longest distance from first to last position of a triple; None for the whole sequence.
        within_documents: Whether spans stay inside one document; the forward step then has to say which is where.
        ramp_steps: Iterations over which the weight rises once the gate is open; 0 for the whole weight at once.
        diagnose_every: Iterations between two diagnoses, see `megacpp_stp.stp.diagnosis`; 0 for none.
        families: Source letter of each tap in order, for the meter; empty when not known.
    """

    weight: float
    n_spans: int
    start_step: int
    taps: tuple[int, ...]
    seed: int
    objective: Literal["triple", "chord"] = "triple"
    max_span: int | None = None
    within_documents: bool = False
    ramp_steps: int = 0
    diagnose_every: int = 0
    families: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(set(self.taps)) == len(self.taps) > 0, self.taps
        assert len(self.families) in (0, len(self.taps)), self.families

    def is_active(self, iteration: int) -> bool:
        """Whether iteration number `iteration` (iterations completed before it) has the STP gradient."""
        return self.weight > 0 and iteration >= self.start_step

    def weight_at(self, iteration: int) -> float:
        """The weight in iteration number `iteration`: 0 before the gate, then ``k / ramp_steps`` of it in the k-th.

        A function of the number alone, so that a resumed run goes on exactly.
        """
        if not self.is_active(iteration):
            return 0.0
        done = iteration - self.start_step + 1
        return self.weight if done >= self.ramp_steps else self.weight * done / self.ramp_steps

    def is_diagnosed(self, iteration: int) -> bool:
        """Whether iteration number `iteration` is measured in depth: each `diagnose_every`-th, counted from 1."""
        return self.diagnose_every > 0 and (iteration + 1) % self.diagnose_every == 0


def tap_name(tap: int) -> str:
    """A tap in records and messages: the layer's number, or ``final-norm``."""
    return _FINAL_NORM_NAME if tap == FINAL_NORM else str(tap)


def write_taps(config: StpConfig) -> str:
    """The taps as one argument: ``6:A,12:R,final-norm``; without letters where the families are not known."""
    families = config.families or ("",) * len(config.taps)
    named = zip(config.taps, families, strict=True)
    return ",".join(f"{tap}:{family}" if tap != FINAL_NORM and family else tap_name(tap) for tap, family in named)


def read_taps(text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The taps and families of `write_taps`.

    Raises:
        ValueError: Something else.
    """
    taps, families = [], []
    for part in text.split(","):
        number, _, family = part.partition(":")
        after_norm = part == _FINAL_NORM_NAME
        if not after_norm and int(number) < 1:
            raise ValueError(text)
        taps.append(FINAL_NORM if after_norm else int(number))
        families.append(_FINAL_NORM_NAME if after_norm else family)
    if len(set(taps)) < len(taps):
        raise ValueError(text)
    return tuple(taps), tuple(families) if all(families) else ()
