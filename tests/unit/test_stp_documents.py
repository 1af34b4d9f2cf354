"""Triples inside documents: all patterns of short sequences counted exactly, long ones against Python's integers."""

import bisect
import itertools
import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp import compute_stp_loss
from megacpp_stp.stp.documents import (
    below,
    documents_of_starts,
    documents_of_tokens,
    neighbours,
    triples_of_documents,
    without_padding,
)
from megacpp_stp.stp.reference import reference_stp_loss, reference_triples, reference_words
from megacpp_stp.stp.sampler import DrawKey, draw_document_triples
from megacpp_stp.stp.states import generator_words
from megacpp_stp.stp.windows import count_triples

CPU = torch.device("cpu")
KEY = DrawKey(seed=1234, iteration=7, microbatch=2, data_rank=1, layer=6)


def patterns(length):
    """Every way to cut a sequence into documents and to pad it."""
    for cuts in itertools.product((0, 1), repeat=length - 1):
        numbers = [0, *itertools.accumulate(cuts)]
        for pads in itertools.product((False, True), repeat=length):
            yield [-1 if pad else number for number, pad in zip(numbers, pads, strict=True)]


def every_word(total, followers):
    """[4, K, 1] words that run through all remainders: of the count of triples, and of up to `followers` places."""
    sizes = (total, 1, math.lcm(*range(1, followers + 1)), math.lcm(*range(1, followers)))
    grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    return grid.t().unsqueeze(-1)


@pytest.mark.parametrize("max_span", [None, 2, 3])
def test_every_pattern_of_five_positions_is_exactly_uniform(max_span):
    allowed_counts = set()
    for pattern in patterns(5):
        allowed = reference_triples(pattern, max_span=max_span)
        allowed_counts.add(len(allowed))
        words = every_word(max(1, len(allowed)), 4)
        spans = triples_of_documents(words, torch.tensor([pattern]), max_span=max_span)
        if not allowed:
            assert not spans.allowed.any() and not spans.positions.any()
            continue
        assert spans.allowed.all()
        counts = Counter(map(tuple, spans.positions.reshape(3, -1).t().tolist()))
        assert counts == dict.fromkeys(allowed, words.shape[1] // len(allowed)), pattern
    assert {0, 1, count_triples(5, min(max_span or 4, 4))} <= allowed_counts


def test_all_patterns_of_seven_positions_in_one_batch():
    """Sequences of one batch do not mix, and whatever the words, only allowed triples come out."""
    documents = torch.tensor(list(patterns(7)))
    words = torch.randint(0, 2**62, (4, 40, len(documents)), generator=torch.Generator().manual_seed(0))
    for max_span in (None, 4):
        positions, allowed = triples_of_documents(words, documents, max_span=max_span)
        for b, pattern in enumerate(documents.tolist()):
            triples = set(reference_triples(pattern, max_span=max_span))
            assert allowed[:, b].all() == bool(triples) == allowed[:, b].any()
            assert set(map(tuple, positions[:, :, b].t().tolist())) <= (triples or {(0, 0, 0)})


PACKED = [0, 0, 0, -1, 1, 1, 1, 1, 1, 2, 2, 5, 5, 5, 5, -1]


@pytest.mark.parametrize("max_span", [None, 2, 3])
def test_keyed_draws_are_uniform(max_span):
    documents = torch.tensor([PACKED, [0] * 9 + [-1] * 7, [3] * 16])
    positions, allowed = draw_document_triples(KEY, documents, n_spans=30_000, max_span=max_span)
    assert allowed.all()
    for b in range(3):
        cells = reference_triples(documents[b].tolist(), max_span=max_span)
        counts = Counter(map(tuple, positions[:, :, b].t().tolist()))
        assert counts.keys() == set(cells)
        expected, freedom = 30_000 / len(cells), len(cells) - 1
        statistic = sum((counts[cell] - expected) ** 2 / expected for cell in cells)
        assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


def integer_triple(words, documents, max_span):
    """The same draw by Python's integers, which have no largest."""
    length = len(documents)
    window = min(max_span or length, length - 1)
    end = [length] * length
    for i in reversed(range(length - 1)):
        end[i] = end[i + 1] if documents[i] == documents[i + 1] else i + 1
    reach = [0 if documents[i] < 0 else min(end[i] - 1 - i, window) for i in range(length)]
    cumulative = list(itertools.accumulate(math.comb(m, 2) for m in reach))
    bits = count_triples(length, window).bit_length()
    step = 62 - bits
    steps = math.ceil(max(0, bits + 40 - 62) / step)
    number = words[0]
    for i in range(steps):
        number = (number << step) + ((words[1] >> (i * step)) % 2**step)
    start = bisect.bisect_right(cumulative, number % cumulative[-1])
    followers = list(range(start + 1, start + 1 + reach[start]))
    one = followers.pop(words[2] % len(followers))
    two = followers.pop(words[3] % len(followers))
    return [start, min(one, two), max(one, two)]


@pytest.mark.parametrize(("length", "max_span"), [(32768, None), (32768, 512), (200_000, None), (2**21, None)])
def test_long_sequences_equal_the_integer_form(length, max_span):
    """One document of 2**21 positions has 1.5e18 triples, the most that is let in; int64 ends at 9.2e18."""
    thirds = [0] * (length // 3) + [1] * (length - length // 3)
    documents = torch.tensor([[7] * length, thirds])
    positions, allowed = draw_document_triples(KEY, documents, n_spans=4, max_span=max_span)
    assert allowed.all()
    for b, span in ((0, 0), (1, 0)) if length > 10**6 else itertools.product((0, 1), range(4)):
        words = reference_words(**asdict(KEY), index=span * 2 + b)
        assert positions[:, span, b].tolist() == integer_triple(words, documents[b].tolist(), max_span)


@pytest.mark.parametrize("bound", [10, 2**21, 5_864_062_014_464, 2**50, 2**61 - 1])
def test_the_long_division_is_exact(bound):
    words = torch.randint(0, 2**62, (2, 1000), generator=torch.Generator().manual_seed(3))
    words[:, 0], words[:, 1] = 0, 2**63 - 1
    size = torch.randint(1, bound, (1000,), generator=torch.Generator().manual_seed(4)).clamp(min=1)
    size[0] = size[1] = bound
    step = 62 - bound.bit_length()
    steps = math.ceil(max(0, bound.bit_length() - 22) / step)
    assert steps * step + 62 >= bound.bit_length() + 40 and steps * step <= 62
    for found, high, low, n in zip(
        below(size, words, bound=bound).tolist(), *words.tolist(), size.tolist(), strict=True
    ):
        for i in range(steps):
            high = (high << step) + ((low >> (i * step)) % 2**step)
        assert found == high % n


def test_neighbours_are_counted_inside_runs():
    before, after = neighbours(torch.tensor([[4, 4, 4, -1, -1, 4, 9, 9], [1, 1, 1, 1, 1, 1, 1, 1]]))
    assert before.tolist() == [[0, 1, 2, 0, 0, 0, 0, 1], list(range(8))]
    assert after.tolist() == [[2, 1, 0, 0, 0, 0, 1, 0], list(range(7, -1, -1))]


def test_documents_of_a_batch():
    starts = torch.tensor([[True, False, True, False, False], [False, False, False, True, True]])
    assert documents_of_starts(starts).tolist() == [[1, 1, 2, 2, 2], [0, 0, 0, 1, 2]]
    tokens = torch.tensor([[5, 0, 6, 7, 0], [0, 0, 5, 5, 5]])
    documents = documents_of_tokens(tokens, end_of_document=0)
    assert documents.tolist() == [[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]
    padding = torch.tensor([[False] * 5, [True] + [False] * 4])
    assert without_padding(documents, padding).tolist() == [[0, 0, 1, 1, 1], [-1, 1, 2, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_one_document_is_the_whole_sequence(dtype):
    documents = torch.zeros(1, 6, dtype=dtype)
    positions, allowed = draw_document_triples(KEY, documents, n_spans=2000)
    assert allowed.all() and positions.dtype == torch.int64
    assert set(map(tuple, positions[:, :, 0].t().tolist())) == set(reference_triples([0] * 6))


@pytest.mark.parametrize("length", [1, 2])
def test_sequences_without_room_are_not_allowed(length):
    positions, allowed = draw_document_triples(KEY, torch.zeros(2, length, dtype=torch.int64), n_spans=3)
    assert positions.shape == (3, 3, 2) and not allowed.any() and not positions.any()


def test_the_loss_reads_allowed_rows_alone():
    """NaN in the padding, in documents of two, and in a sequence with nothing to draw: neither value nor gradient."""
    hidden = torch.randn(3, 16, 4, dtype=torch.float64)
    documents = torch.tensor([PACKED, [0, 0, 1, 1] * 4, [2] * 16])
    bad = torch.zeros(3, 16, dtype=torch.bool)
    bad[0, [3, 9, 10, 15]] = True
    bad[1] = True
    hidden[bad] = math.nan
    hidden.requires_grad_()
    loss = compute_stp_loss(hidden, n_spans=300, documents=documents)
    loss.backward()
    assert 0 < loss.item() < 2
    assert torch.equal(hidden.grad.ne(0).any(-1), ~bad)


def test_the_loss_is_the_mean_over_sequences_that_have_triples():
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0], [0, 1, 2]])
    alone = compute_stp_loss(hidden[:1], n_spans=1)
    torch.testing.assert_close(compute_stp_loss(hidden, n_spans=5, documents=documents), alone)


def test_no_allowed_triple_is_a_loss_of_zero_with_a_gradient_of_zero():
    hidden = torch.randn(2, 8, 4, requires_grad=True)
    loss = compute_stp_loss(hidden, n_spans=2, documents=torch.full((2, 8), -1))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


def test_both_layouts_take_documents_batch_first_and_equal_the_plain_form():
    hidden = torch.randn(2, 16, 4, dtype=torch.float64)
    documents = torch.tensor([PACKED, PACKED[::-1]])
    one, other = (
        compute_stp_loss(
            states,
            n_spans=9,
            documents=documents,
            max_span=3,
            sequence_first=first,
            generator=torch.Generator().manual_seed(2),
        )
        for states, first in ((hidden, False), (hidden.transpose(0, 1).contiguous(), True))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    words = generator_words(4, n_spans=9, batch=2, generator=torch.Generator().manual_seed(2), device=CPU)
    positions, _ = triples_of_documents(words, documents, max_span=3)
    triples = [(b, *positions[:, k, b].tolist()) for k in range(9) for b in range(2)]
    truth = reference_stp_loss(hidden.transpose(0, 1), triples, tolerance=torch.finfo(torch.float64).eps)
    torch.testing.assert_close(one, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "documents",
    [torch.zeros(16, 2, dtype=torch.int64), torch.zeros(2, 16), torch.zeros(2, 16, dtype=torch.bool)],
)
def test_documents_that_do_not_fit_are_an_error(documents):
    with pytest.raises(UserError, match="documents"):
        compute_stp_loss(torch.randn(2, 16, 4), n_spans=1, documents=documents)


def test_more_positions_than_int64_can_count_are_an_error():
    with pytest.raises(UserError, match="documents"):
        draw_document_triples(KEY, torch.zeros(1, 2**21 + 1, dtype=torch.int64), n_spans=1)
