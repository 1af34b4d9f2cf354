"""The keys that the indexer chooses: the same sets as the formula, ties to the left, for any chunks and bounds."""

import pytest
import torch

from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.chunks import row_chunks
from megacpp_stp.dsa.reference import reference_scores, reference_selection
from megacpp_stp.dsa.selection import best_positions, select_keys

ONE_ROW = 1  # a scratch that holds no row still computes one


def inputs(s, b, i, d, t=None, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(1000 * s + seed)
    shapes = ((s, b, i, d), (s, b, i), (t or s, b, d))
    return [torch.randn(shape, dtype=dtype, generator=random) for shape in shapes]


def as_mask(indices, t):
    mask = torch.zeros(*indices.shape[:2], t + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(indices < 0, t, indices).long(), True)
    return mask[..., :t]


def packed(*lengths):
    """Bounds of documents one after the other."""
    s = sum(lengths)
    starts = torch.repeat_interleave(torch.tensor([0, *lengths]).cumsum(0)[:-1], torch.tensor(lengths))
    return Bounds(starts=starts, ends=torch.arange(1, s + 1), triangular=True)


@pytest.mark.parametrize("scratch", [ONE_ROW, 3000, None])
@pytest.mark.parametrize("use_relu", [True, False])
@pytest.mark.parametrize(("s", "b", "i", "d", "topk"), [(1, 1, 1, 1, 1), (13, 3, 5, 7, 4), (29, 1, 8, 3, 40)])
def test_the_sets_are_those_of_the_formula(s, b, i, d, topk, use_relu, scratch):
    q, weights, k = inputs(s, b, i, d)
    for bounds in (Bounds.causal(s), packed(s) if s < 5 else packed(4, 1, s - 5)):
        found = select_keys(q, weights, k, topk=topk, bounds=bounds, use_relu=use_relu, scratch_bytes=scratch)
        assert found.dtype == torch.int32
        assert found.shape == (b, s, min(topk, s))
        wanted = reference_selection(reference_scores(q, weights, k, use_relu=use_relu), bounds, topk=topk)
        assert torch.equal(as_mask(found, s), wanted)
        assert torch.equal((found >= 0).sum(-1), wanted.sum(-1))


def test_early_queries_choose_all_that_they_see_and_nothing_else():
    q, weights, k = inputs(9, 2, 4, 5)
    found = select_keys(q, weights, k, topk=6, bounds=Bounds.causal(9))
    for row in range(9):
        seen = sorted(found[0, row].tolist())
        assert len([one for one in seen if one >= 0]) == min(row + 1, 6)
        assert seen[-1] <= row
        if row < 6:
            assert seen[5 - row :] == list(range(row + 1))


def test_queries_may_be_another_part_of_the_sequence_than_the_keys():
    """As under context parallelism: rows 3, 4, 5 and 18 to 20 of 24."""
    rows = torch.tensor([3, 4, 5, 18, 19, 20])
    q, weights, k = inputs(24, 2, 6, 4)
    bounds = Bounds(starts=torch.zeros(6, dtype=torch.int32), ends=(rows + 1).int(), triangular=False)
    part = select_keys(q[rows], weights[rows], k, topk=5, bounds=bounds, scratch_bytes=5000)
    whole = select_keys(q, weights, k, topk=5, bounds=Bounds.causal(24))
    assert torch.equal(part, whole[:, rows])


def test_a_query_that_sees_nothing_chooses_nothing():
    q, weights, k = inputs(3, 1, 2, 2)
    bounds = Bounds(starts=torch.tensor([0, 5, 0]), ends=torch.tensor([1, 2, 3]), triangular=True)
    assert select_keys(q, weights, k, topk=2, bounds=bounds)[0, 1].tolist() == [-1, -1]


@pytest.mark.parametrize("scratch", [ONE_ROW, 20000, None])
def test_of_equal_scores_the_earliest_are_chosen(scratch):
    """Two heads with a ReLU give many keys the score zero; whole numbers give many others equal ones."""
    q, weights, k = ((2 * one).round() for one in inputs(60, 2, 2, 2))
    scores = reference_scores(q, weights, k)
    bounds = Bounds.causal(60)
    wanted = reference_selection(scores, bounds, topk=11)
    assert torch.equal(as_mask(select_keys(q, weights, k, topk=11, bounds=bounds, scratch_bytes=scratch), 60), wanted)
    last = scores.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
    seen = torch.ones(60, 60, dtype=torch.bool).tril()
    assert ((scores == last) & seen & ~wanted).any(-1).sum() > 20  # the tie mattered


def test_best_positions_by_hand():
    scores = torch.tensor(
        [[1.0, 3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-torch.inf, 5.0, -torch.inf, 5.0, 5.0]]
    )
    assert best_positions(scores, 3).tolist() == [[1, 3, 0], [0, 1, 2], [1, 3, 4]]
    assert sorted(best_positions(scores, 4)[2].tolist()) == [-1, 1, 3, 4]


def test_bf16_inputs_are_scored_in_fp32():
    q, weights, k = (one.bfloat16() for one in inputs(31, 1, 4, 8))
    found = select_keys(q, weights, k, topk=5, bounds=Bounds.causal(31))
    exact = select_keys(q.double(), weights.double(), k.double(), topk=5, bounds=Bounds.causal(31))
    assert torch.equal(as_mask(found, 31), as_mask(exact, 31))


def test_chunks_cover_all_rows_once_and_fit():
    for rows, per_row, scratch in ((1, 7, 3), (10, 3, 10), (10, 1, 100)):
        found = sorted(row_chunks(rows, bytes_per_row=per_row, scratch_bytes=scratch), key=lambda one: one.start)
        assert [row for one in found for row in range(one.start, one.stop)] == list(range(rows))
        assert all(one.stop - one.start <= max(1, scratch // per_row) for one in found)


@pytest.mark.parametrize("where", [slice(None), (slice(None), slice(0, 1)), (0, slice(2, 3))])
def test_scores_that_are_no_numbers_still_name_keys_that_exist(where):
    """So that NaN comes out at the end, and the run is stopped for it: on a GPU a place beyond the end is a crash."""
    scores = torch.randn(2, 9)
    scores[where] = torch.nan
    positions = best_positions(scores, 5)
    assert ((positions >= 0) & (positions < 9)).all()
