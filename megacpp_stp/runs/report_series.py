"""Long series made short enough to be drawn: bins of neighbouring iterations. No table and no interval reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MOST_POINTS = 300  # more than a line of a page's width shows
MOST_COLUMNS = 80  # of a heat map: single iterations are noise there


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A series in bins; bins without a value are left out.

    Attributes:
        x: Mean iteration of each bin.
        mean: Mean value of each.
        low: Lowest value of each.
        high: Highest value of each.
    """

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def bin_size(last_iteration: int, *, most: int = MOST_POINTS) -> int:
    """Iterations a bin takes, so that 1 to `last_iteration` make at most `most` bins."""
    return max(-(-last_iteration // most), 1)


def bin_of(iteration: int, *, size: int) -> int:
    """Number of an iteration's bin, from 0: bins start at the same iterations in all series."""
    return (iteration - 1) // size


def thin(values: Mapping[int, float], *, size: int) -> Series:
    """Put a series into bins of `size` iterations."""
    bins: dict[int, list[int]] = {}
    for iteration in sorted(values):
        bins.setdefault(bin_of(iteration, size=size), []).append(iteration)
    inside = [[values[i] for i in found] for found in bins.values()]
    return Series(
        x=tuple(math.fsum(found) / len(found) for found in bins.values()),
        mean=tuple(math.fsum(found) / len(found) for found in inside),
        low=tuple(map(min, inside)),
        high=tuple(map(max, inside)),
    )
