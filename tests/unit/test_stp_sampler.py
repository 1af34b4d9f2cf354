"""The keyed draw, and the triples of one sequence with and without a window: each exact, by counting all draws."""

import itertools
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp.reference import reference_philox, reference_triples, reference_words
from megacpp_stp.stp.sampler import DrawKey, draw_triples, philox, random_words
from megacpp_stp.stp.windows import count_triples, distinct_sorted, triples_of_sequence, windowed_triples

CPU = torch.device("cpu")
KEY = DrawKey(seed=1234, iteration=7, microbatch=2, data_rank=1, layer=6)

# Known answers of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert reference_philox(counter, key) == answer
    assert tuple(philox(torch.tensor(counter), key).tolist()) == answer
    assert tuple(philox(torch.tensor(counter), torch.tensor(key).unbind()).tolist()) == answer


def test_philox_equals_the_integer_form_everywhere():
    words = torch.randint(0, 2**32, (4, 5, 3))
    found = philox(words, (99, 2**32 - 1))
    for place in itertools.product(range(5), range(3)):
        counter = tuple(words[(slice(None), *place)].tolist())
        assert tuple(found[(slice(None), *place)].tolist()) == reference_philox(counter, (99, 2**32 - 1))


def test_words_equal_the_integer_form():
    words = random_words(KEY, n_spans=3, batch=5, device=CPU).reshape(4, 15)
    assert words.min() >= 0
    for index in range(15):
        assert tuple(words[:, index].tolist()) == reference_words(**asdict(KEY), index=index)


def test_a_draw_is_the_remainders_of_its_words():
    """Holds the draw itself fixed: a run that is resumed with newer code goes on with the same triples."""
    drawn = draw_triples(KEY, length=11, batch=2, n_spans=3, device=CPU).reshape(3, 6)
    for index in range(6):
        first, second, third, _ = reference_words(**asdict(KEY), index=index)
        left = list(range(11))
        one = left.pop(first % 11)
        two = left.pop(second % 10)
        assert drawn[:, index].tolist() == sorted((one, two, left[third % 9]))


def chi_square(triples, allowed):
    """Pearson's statistic over the allowed triples, and its degrees of freedom."""
    counts = Counter(map(tuple, triples.reshape(3, -1).t().tolist()))
    assert counts.keys() <= set(allowed)
    n = triples[0].numel()
    expected = n / len(allowed)
    return sum((counts[cell] - expected) ** 2 / expected for cell in allowed), len(allowed) - 1


@pytest.mark.parametrize(("length", "max_span"), [(3, None), (4, None), (8, None), (8, 2), (8, 3), (12, 5), (9, 8)])
def test_draws_are_uniform_over_the_allowed_triples(length, max_span):
    triples = draw_triples(KEY, length=length, batch=4, n_spans=10_000, device=CPU, max_span=max_span)
    statistic, freedom = chi_square(triples, reference_triples([0] * length, max_span=max_span))
    # The draws are fixed by their seed, so this either always holds or never; 4 sigma of a chi-square.
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


def all_draws(*sizes):
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes)).t()


@pytest.mark.parametrize("length", range(3, 10))
def test_every_triple_comes_from_six_draws(length):
    triples = distinct_sorted(*all_draws(length, length - 1, length - 2))
    counts = Counter(map(tuple, triples.t().tolist()))
    assert counts == dict.fromkeys(reference_triples([0] * length), 6)


@pytest.mark.parametrize(("length", "window"), [(t, w) for t in range(3, 11) for w in range(2, t)])
def test_every_triple_of_a_window_comes_from_six_draws(length, window):
    a, b, x = all_draws(window, window - 1, 3 * length - 2 * window - 2)
    counts = Counter(map(tuple, windowed_triples(a, b, x, length=length, window=window).t().tolist()))
    allowed = reference_triples([0] * length, max_span=window)
    assert counts == dict.fromkeys(allowed, 6)
    assert count_triples(length, window) == len(allowed)


@pytest.mark.parametrize("max_span", [10, 11, 4096])
def test_a_window_that_holds_the_sequence_is_no_window(max_span):
    without = draw_triples(KEY, length=11, batch=2, n_spans=50, device=CPU)
    assert torch.equal(without, draw_triples(KEY, length=11, batch=2, n_spans=50, device=CPU, max_span=max_span))


def test_a_window_of_a_long_sequence():
    triples = draw_triples(KEY, length=32768, batch=4, n_spans=5000, device=CPU, max_span=256)
    s, r, t = triples.reshape(3, -1)
    assert (s < r).all() and (r < t).all() and (t - s).max() <= 256 and t.max() < 32768
    # t - s = d has (T - d)(d - 1) triples: a mean of 170.93 and a standard deviation of 60.2, 0.43 for 20000.
    weights = [(d, (32768 - d) * (d - 1)) for d in range(2, 257)]
    mean = sum(d * w for d, w in weights) / sum(w for _, w in weights)
    assert (t - s).double().mean().item() == pytest.approx(mean, abs=4 * 0.43)
    assert s.double().mean().item() == pytest.approx((32768 - mean) / 2, abs=4 * 67)


@pytest.mark.parametrize("max_span", [1, 0, -3])
def test_a_window_without_room_is_an_error(max_span):
    with pytest.raises(UserError, match="max_span"):
        draw_triples(KEY, length=11, batch=2, n_spans=1, device=CPU, max_span=max_span)


def test_the_largest_words_stay_inside():
    words = torch.full((4, 1, 1), 2**63 - 1)
    for max_span in (None, 2, 7, 1000):
        s, r, t = triples_of_sequence(words, length=2**20, max_span=max_span).flatten().tolist()
        assert 0 <= s < r < t < 2**20
        assert max_span is None or t - s <= max_span


@pytest.mark.parametrize("field", ["seed", "iteration", "microbatch", "data_rank", "layer"])
def test_each_part_of_the_key_changes_the_draw(field):
    draw = draw_triples(KEY, length=4096, batch=2, n_spans=4, device=CPU)
    other_key = replace(KEY, **{field: getattr(KEY, field) + 1})
    other = draw_triples(other_key, length=4096, batch=2, n_spans=4, device=CPU)
    assert draw.shape == (3, 4, 2)
    assert not torch.equal(draw, other)
    assert torch.equal(draw, draw_triples(KEY, length=4096, batch=2, n_spans=4, device=CPU))
    assert torch.equal(other, draw_triples(other_key.as_tensor(CPU), length=4096, batch=2, n_spans=4, device=CPU))


def test_no_random_stream_is_touched():
    before = torch.get_rng_state()
    draw_triples(KEY, length=64, batch=2, n_spans=4, device=CPU, max_span=8)
    assert torch.equal(before, torch.get_rng_state())
