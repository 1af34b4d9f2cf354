"""Intervals of means: against plain loops, known numbers, and how often they hold the truth."""

import math
from random import Random

import pytest

from megacpp_stp.runs.bootstrap import (
    block_interval,
    block_length,
    reference_means,
    resampled_means,
    seed_interval,
    student_quantile,
)


def autoregressive(n, *, persistence, random):
    """Values of mean 0, each `persistence` times the last one plus noise, from the stationary distribution on."""
    value = random.gauss() / math.sqrt(1 - persistence**2)
    found = []
    for _ in range(n):
        value = persistence * value + random.gauss()
        found.append(value)
    return found


@pytest.mark.parametrize(("n", "length"), [(12, 1), (12, 4), (13, 4), (29, 7), (30, 30)])
def test_resamples_are_blocks_laid_end_to_end(n, length):
    values = autoregressive(n, persistence=0.5, random=Random(n))
    means, expected = resampled_means(values, length=length, resamples=50)
    assert means == pytest.approx(reference_means(values, length=length, resamples=50), abs=1e-12)
    # Written out: every block is as likely, and the last is cut.
    rest = n - (-(-n // length) - 1) * length
    starts = range(n - length + 1)
    whole = [sum(values[start : start + length]) for start in starts]
    part = [sum(values[start : start + rest]) for start in starts]
    count = -(-n // length)
    assert expected == pytest.approx(((count - 1) * sum(whole) + sum(part)) / len(starts) / n, abs=1e-12)


def test_an_interval_is_the_resamples_percentiles_around_the_mean():
    """Values near the ends are in fewer blocks; with all the weight there that must not move the interval."""
    values = [30.0, -20.0, *(0.1 * (i % 3) for i in range(37)), 60.0]
    means = sorted(reference_means(values, length=8, resamples=2001))
    expected = 8 * sum(sum(values[i : i + 8]) for i in range(33)) / 33 / 8 / 8
    mean, wide = sum(values) / 40, math.sqrt(40 / 32)
    assert abs(expected - mean) > 0.5
    found = block_interval(values, length=8, resamples=2001)
    assert found.low == pytest.approx(mean + wide * (means[50] - expected), abs=1e-9)
    assert found.high == pytest.approx(mean + wide * (means[1950] - expected), abs=1e-9)


def coverage(n, *, persistence, length=None, repeats, resamples):
    """How often the interval holds the true mean."""
    random = Random(5)
    hits = 0
    for _ in range(repeats):
        values = autoregressive(n, persistence=persistence, random=random)
        found = block_interval(values, length=length, resamples=resamples)
        hits += found.low <= 0 <= found.high
    return hits / repeats


def test_an_interval_holds_the_true_mean_of_dependent_values():
    """0.88 and 0.63 here; single values as blocks take each iteration for news."""
    effort = {"persistence": 0.6, "repeats": 60, "resamples": 150}
    assert coverage(150, **effort) >= 0.82
    assert coverage(150, length=1, **effort) < 0.75


# The table of docs/compare.md, in per cent.
COVERAGE = {
    (30, None): {0.0: 93, 0.5: 82, 0.8: 66, 0.95: 38},
    (150, None): {0.0: 92, 0.5: 89, 0.8: 84, 0.95: 69},
    (150, 1): {0.0: 92, 0.5: 70, 0.8: 48, 0.95: 25},
}


@pytest.mark.slow
@pytest.mark.parametrize(("n", "length"), COVERAGE)
def test_the_coverage_that_the_docs_say(n, length):
    found = {
        persistence: round(100 * coverage(n, persistence=persistence, length=length, repeats=400, resamples=400))
        for persistence in COVERAGE[n, length]
    }
    assert found == pytest.approx(COVERAGE[n, length], abs=1)  # other libraries of logarithms round otherwise


def test_blocks_grow_with_what_neighbours_share():
    lengths = [
        block_length(autoregressive(400, persistence=persistence, random=Random(3))) for persistence in (0.0, 0.5, 0.9)
    ]
    assert lengths == sorted(set(lengths))
    assert lengths[0] <= 3
    assert 20 <= lengths[2] <= 60


@pytest.mark.parametrize("persistence", [0.5, 0.7, 0.8, 0.9])
def test_the_block_length_is_the_rule_written_out(persistence):
    """Politis and White's sums in plain loops, where their last lag is known."""
    values = autoregressive(400, persistence=persistence, random=Random(8))
    n, mean = len(values), sum(values) / len(values)
    covariance = [sum((values[i] - mean) * (values[i + k] - mean) for i in range(n - k)) / n for k in range(60)]
    quiet = [abs(c / covariance[0]) < 2 * math.sqrt(math.log10(n) / n) for c in covariance]
    m = next(m for m in range(50) if all(quiet[m + 1 : m + 6]))
    last = 2 * max(m, 1)
    taper = [1 if k <= last / 2 else 2 * (1 - k / last) for k in range(last + 1)]
    g = 2 * sum(taper[k] * k * covariance[k] for k in range(1, last + 1))
    spectrum = covariance[0] + 2 * sum(taper[k] * covariance[k] for k in range(1, last + 1))
    wanted = (2 * g**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    assert 1 < wanted < min(3 * math.sqrt(n), n / 3)
    assert block_length(values) == math.ceil(wanted)


def test_the_same_values_give_the_same_interval_wherever_they_lie():
    values = autoregressive(60, persistence=0.5, random=Random(1))
    found = block_interval(values)
    assert found == block_interval(values)
    moved = block_interval([value + 100 for value in values])
    assert (moved.low - 100, moved.high - 100) == pytest.approx((found.low, found.high), abs=1e-9)
    assert found.low < sum(values) / 60 < found.high


@pytest.mark.parametrize("values", [[0.0] * 40, [0.25] * 40, [1e-200 * i for i in range(40)], [1e100, -1e100] * 20])
def test_degenerate_and_extreme_values_give_an_interval(values):
    found = block_interval(values)
    assert found.low <= math.fsum(values) / 40 <= found.high


def test_too_few_values_give_none():
    assert block_interval([1.0, 2.0] * 5) is None
    assert block_interval([1.0, 2.0] * 6) is not None
    assert seed_interval([1.0, 2.0]) is None


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (30, 2.04227)])
def test_quantiles_of_student(freedom, t):
    """Any table of the distribution, two-sided 95 %."""
    assert student_quantile(freedom) == pytest.approx(t, abs=1e-4)


def test_an_interval_over_seeds_is_students():
    found = seed_interval([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    assert found.block_length is None
