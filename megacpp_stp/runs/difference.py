"""What paired series say together: the mean of their differences, its interval, and in words what that shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megacpp_stp.runs.bootstrap import FEWEST_SEEDS, Interval, block_interval, seed_interval

LOWER, HIGHER, NOT_SHOWN, NO_INTERVAL = "lower", "higher", "no difference shown", "no interval"


def interval_of(by_seed: Sequence[Sequence[float]]) -> tuple[Interval | None, str]:
    """The interval of a mean difference.

    Args:
        by_seed: Differences by seed and iteration.

    Returns:
        The interval and what it is over: seeds, where there are enough; else blocks of iterations of their mean. None
        where there is too little to say.
    """
    seeds = len(by_seed)
    if seeds >= FEWEST_SEEDS:
        return seed_interval([mean(one) for one in by_seed]), f"Student's t over {seeds} seeds"
    averaged = [mean(column) for column in zip(*by_seed, strict=True)]
    interval = block_interval(averaged)
    of = "1 seed" if seeds == 1 else f"the mean of {seeds} seeds"
    if interval is None:
        return None, f"{counted(len(averaged))} of {of}, too few for one"
    return interval, f"moving blocks of {interval.block_length}, over {counted(len(averaged))} of {of}"


def shown_by(interval: Interval | None) -> str:
    """`LOWER` or `HIGHER` where 0 is outside, `NOT_SHOWN` where it is inside, or `NO_INTERVAL`."""
    if interval is None:
        return NO_INTERVAL
    if interval.high < 0:
        return LOWER
    return HIGHER if interval.low > 0 else NOT_SHOWN


def relative_to(base: float, difference: float) -> float | None:
    """A difference over the size of the base's mean; None where that is 0."""
    relative = difference / abs(base) if base else math.inf
    return relative if math.isfinite(relative) else None


def mean(values: Sequence[float]) -> float:
    """Of one value or more."""
    return math.fsum(values) / len(values)


def counted(iterations: int) -> str:
    """How many, in words."""
    return f"{iterations} iteration{'s' if iterations != 1 else ''}"
