import itertools
from dataclasses import replace

import pytest
import torch

from megacpp_stp.stp.objective import random_triples
from megacpp_stp.stp.reference import reference_philox
from megacpp_stp.stp.sampler import DrawKey, draw_triples, philox

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


def test_philox_equals_the_integer_form_everywhere():
    words = torch.randint(0, 2**32, (4, 5, 3))
    found = philox(words, (99, 2**32 - 1))
    for place in itertools.product(range(5), range(3)):
        counter = tuple(words[(slice(None), *place)].tolist())
        assert tuple(found[(slice(None), *place)].tolist()) == reference_philox(counter, (99, 2**32 - 1))


def chi_square(triples, length):
    """Pearson's statistic over all C(length, 3) triples, and its degrees of freedom."""
    cells = list(itertools.combinations(range(length), 3))
    code = (triples[0] * length + triples[1]) * length + triples[2]
    counts = torch.bincount(code.reshape(-1), minlength=length**3)
    observed = torch.tensor([counts[(s * length + r) * length + t] for s, r, t in cells], dtype=torch.float64)
    assert observed.sum() == code.numel()  # nothing but triples s < r < t
    expected = code.numel() / len(cells)
    return ((observed - expected) ** 2 / expected).sum().item(), len(cells) - 1


@pytest.mark.parametrize("length", [3, 4, 5, 8])
@pytest.mark.parametrize("how", ["counter", "generator"])
def test_draws_are_uniform_over_triples(length, how):
    n = 40_000
    if how == "counter":
        triples = draw_triples(KEY, length=length, batch=4, n_spans=n // 4, device=CPU)
    else:
        triples = random_triples(length, n, generator=torch.Generator().manual_seed(1), device=CPU)
    statistic, freedom = chi_square(triples, length)
    # The draws are fixed by their seed, so this either always holds or never; 4 sigma of a chi-square.
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("field", ["seed", "iteration", "microbatch", "data_rank", "layer"])
def test_each_part_of_the_key_changes_the_draw(field):
    draw = draw_triples(KEY, length=4096, batch=2, n_spans=4, device=CPU)
    other = draw_triples(replace(KEY, **{field: getattr(KEY, field) + 1}), length=4096, batch=2, n_spans=4, device=CPU)
    assert draw.shape == (3, 4, 2)
    assert not torch.equal(draw, other)
    assert torch.equal(draw, draw_triples(KEY, length=4096, batch=2, n_spans=4, device=CPU))


def test_no_random_stream_is_touched():
    before = torch.get_rng_state()
    draw_triples(KEY, length=64, batch=2, n_spans=4, device=CPU)
    assert torch.equal(before, torch.get_rng_state())
