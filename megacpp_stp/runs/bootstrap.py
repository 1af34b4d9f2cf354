"""How sure the mean of a series is whose values depend on their neighbours. Plain Python, the same on any machine.

n: values, b: values in a block, d: a value, i: its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

CONFIDENCE = 0.95
FEWEST_VALUES = 12  # fewer say nothing of how they depend on one another
FEWEST_SEEDS = 3
_RESAMPLES = 2000
_SEED = 20260


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where a mean lies, with probability `CONFIDENCE`.

    Attributes:
        low: Lower end.
        high: Upper end.
        block_length: Of the blocks; None where it comes from seeds.
    """

    low: float
    high: float
    block_length: int | None


def block_length(values: Sequence[float]) -> int:
    """How many neighbours a block takes, so that what they share stays together.

    The automatic rule of Politis and White (Econometric Reviews 23, 2004; corrected by Patton, Politis and White,
    Econometric Reviews 28, 2009) for the circular bootstrap, which has the moving one's optimal length: correlations
    are read up to twice the lag after which they are noise, under a flat-top taper. At most a third of the series.
    """
    n = len(values)
    correlation = _autocorrelations(values)
    if not correlation:
        return 1
    last = _last_lag(correlation, n)
    spectrum, slope = 1.0, 0.0
    for lag in range(1, last + 1):
        taper = min(1.0, 2.0 * (1.0 - lag / last))
        spectrum += 2.0 * taper * correlation[lag]
        slope += 2.0 * taper * lag * correlation[lag]
    most = max(math.floor(min(3.0 * math.sqrt(n), n / 3)), 1)
    if spectrum <= 0.0:  # the taper can make it so; then nothing says that short blocks would do
        return most
    found = math.cbrt(1.5 * (slope / spectrum) ** 2 * n)  # (2 slope^2 / (4/3 spectrum^2))^(1/3) n^(1/3)
    return max(math.ceil(min(found, most)), 1)


def _autocorrelations(values: Sequence[float]) -> list[float]:
    """At lag 0, 1, ..., as far as `_last_lag` looks; empty for values that are all alike."""
    n = len(values)
    mean = math.fsum(values) / n
    centred = [value - mean for value in values]
    lags = min(n - 1, 2 * (math.ceil(math.sqrt(n)) + _run_of_noise(n)))
    products = [math.sumprod(centred[: n - lag], centred[lag:]) for lag in range(lags + 1)]
    return [product / products[0] for product in products] if products[0] > 0.0 else []


def _run_of_noise(n: int) -> int:
    return max(5, math.ceil(math.sqrt(math.log10(n))))


def _last_lag(correlation: Sequence[float], n: int) -> int:
    """Twice the largest lag before the first run of lags whose correlations are noise."""
    noise = 2.0 * math.sqrt(math.log10(n) / n)
    needed, quiet = _run_of_noise(n), 0
    for lag in range(1, len(correlation)):
        quiet = quiet + 1 if abs(correlation[lag]) < noise else 0
        if quiet == needed:
            return min(2 * max(lag - needed, 1), len(correlation) - 1)
    return len(correlation) - 1


def block_interval(
    values: Sequence[float], *, length: int | None = None, resamples: int = _RESAMPLES
) -> Interval | None:
    """The mean's interval by the moving-block bootstrap (Kuensch, Annals of Statistics 17, 1989).

    Percentiles of the resampled means, shifted by the difference between the series' mean and their expectation,
    since values near the ends are in fewer blocks (Lahiri, Resampling Methods for Dependent Data, 2003).
    Widened by sqrt(n / (n - b)), which is ours: blocks vary around the series' own mean, as single values do for b = 1.

    Args:
        values: In order; finite.
        length: Of the blocks; None for `block_length`.
        resamples: How many means are drawn.

    Returns:
        None for fewer than `FEWEST_VALUES`.
    """
    n = len(values)
    if n < FEWEST_VALUES:
        return None
    b = block_length(values) if length is None else length
    assert 1 <= b < n, (b, n)
    mean = math.fsum(values) / n
    means, expected = resampled_means([value - mean for value in values], length=b, resamples=resamples)
    means.sort()
    wide = math.sqrt(n / (n - b))
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = (mean + wide * (_quantile(means, part) - expected) for part in (tail, 1.0 - tail))
    return Interval(low=low, high=high, block_length=b)


def draw_starts(n: int, *, length: int, random: Random) -> list[int]:
    """Where the blocks of one resample start: as many as cover n values."""
    return random.choices(range(n - length + 1), k=-(-n // length))


def resampled_means(values: Sequence[float], *, length: int, resamples: int) -> tuple[list[float], float]:
    """Means of resamples, and what they are on average over all draws.

    Sums over blocks are looked up; `reference_means` adds up the values.
    """
    n = len(values)
    count = -(-n // length)
    rest = n - (count - 1) * length  # of the last block, so that each resample has n values
    sums = [0.0, *accumulate(values)]
    whole = [sums[start + length] - sums[start] for start in range(n - length + 1)]
    part = [sums[start + rest] - sums[start] for start in range(n - length + 1)]
    random = Random(_SEED)
    means = []
    for _ in range(resamples):
        starts = draw_starts(n, length=length, random=random)
        means.append((sum(map(whole.__getitem__, starts[:-1])) + part[starts[-1]]) / n)
    expected = ((count - 1) * math.fsum(whole) + math.fsum(part)) / len(whole) / n
    return means, expected


def reference_means(values: Sequence[float], *, length: int, resamples: int) -> list[float]:
    """What `resampled_means` must draw, written out: blocks laid end to end, cut to n values."""
    n, random = len(values), Random(_SEED)
    means = []
    for _ in range(resamples):
        resample: list[float] = []
        for start in draw_starts(n, length=length, random=random):
            resample.extend(values[start : start + length])
        means.append(math.fsum(resample[:n]) / n)
    return means


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Linear between the two nearest."""
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def seed_interval(means: Sequence[float]) -> Interval | None:
    """Student's t interval over independent seeds: one mean difference each.

    Returns:
        None for fewer than `FEWEST_SEEDS`.
    """
    count = len(means)
    if count < FEWEST_SEEDS:
        return None
    mean = math.fsum(means) / count
    variance = math.fsum((value - mean) ** 2 for value in means) / (count - 1)
    half = student_quantile(count - 1) * math.sqrt(variance / count)
    return Interval(low=mean - half, high=mean + half, block_length=None)


def student_quantile(freedom: int) -> float:
    """The t that `CONFIDENCE` of Student's distribution lies within, both ways from 0."""
    low, high = 0.0, 16.0  # 12.71 for one degree of freedom, less for all others
    for _ in range(60):
        middle = (low + high) / 2.0
        if _within(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = 1.0, 0.0
    for step in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    if odd:
        return 2.0 / math.pi * (angle + math.sin(angle) * cosine * total)
    return math.sin(angle) * total
