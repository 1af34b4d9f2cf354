from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.plan.cuts import best_stages, equal_stages, imbalance, stage_costs


def every_cut(blocks, segments):
    for places in combinations(range(1, blocks), segments - 1):
        ends = (0, *places, blocks)
        yield tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def meets(stages, pipeline, needs):
    """Whether every pipeline rank has a block of each set."""
    segment_of = [segment for segment, blocks in enumerate(stages) for _ in range(blocks)]
    ranks = set(range(pipeline))
    return all({segment_of[block] % pipeline for block in members} == ranks for members in needs)


def by_brute_force(costs, segments, pipeline, needs):
    allowed = [stages for stages in every_cut(len(costs), segments) if meets(stages, pipeline, needs)]

    def rank(stages):
        of_stages = stage_costs(costs, stages)
        return max(of_stages), sum(cost * cost for cost in of_stages), stages

    return min(allowed, key=rank, default=None)


@st.composite
def problems(draw):
    blocks = draw(st.integers(1, 10))
    pipeline = draw(st.integers(1, 3))
    segments = pipeline * draw(st.integers(1, 3))
    costs = draw(st.lists(st.integers(0, draw(st.sampled_from([2, 9, 10**13]))), min_size=blocks, max_size=blocks))
    needs = draw(st.lists(st.frozensets(st.integers(0, blocks - 1)), max_size=2))
    return costs, segments, pipeline, needs


@settings(max_examples=600, deadline=None)
@given(problems())
def test_the_cut_is_the_one_that_brute_force_finds(problem):
    costs, segments, pipeline, needs = problem
    expected = by_brute_force(costs, segments, pipeline, needs)
    if expected is None:
        with pytest.raises(UserError) as caught:
            best_stages(costs, segments=segments, pipeline=pipeline, needs=needs)
        assert caught.value.field == "parallel.stages"
    else:
        assert best_stages(costs, segments=segments, pipeline=pipeline, needs=needs) == expected


def test_a_costly_end_gets_fewer_blocks():
    costs = [1] * 11 + [5]
    stages = best_stages(costs, segments=4, pipeline=4)
    assert stages == (3, 4, 4, 1)
    assert stage_costs(costs, stages) == (3, 4, 4, 5)
    assert imbalance(costs, stages) == 5 * 4 / 16
    assert imbalance(costs, equal_stages(12, segments=4)) == 7 * 4 / 16


def test_a_need_is_met_by_the_rank_and_not_by_each_of_its_stages():
    costs = [1, 1, 1, 1, 1, 1, 1, 1]
    # Rank 0 has segments 0 and 2, rank 1 has 1 and 3.
    stages = best_stages(costs, segments=4, pipeline=2, needs=[{0, 7}])
    assert stages == (2, 2, 2, 2)
    with pytest.raises(UserError, match="every kind of block"):
        best_stages(costs[:4], segments=4, pipeline=2, needs=[{0, 2}])


def test_a_deep_model_is_cut_in_no_time():
    # Few needed blocks over many virtual stages: what makes the search hold several states a place.
    costs = [3 if block % 4 else 7 for block in range(120)]
    stages = best_stages(costs, segments=32, pipeline=8, needs=[set(range(0, 120, 7)), set(range(3, 120, 11))])
    assert sum(stages) == 120
    assert meets(stages, 8, [set(range(0, 120, 7)), set(range(3, 120, 11))])


@pytest.mark.parametrize(("blocks", "segments", "expected"), [(52, 4, (13,) * 4), (7, 3, (3, 2, 2)), (2, 2, (1, 1))])
def test_equal_counts(blocks, segments, expected):
    assert equal_stages(blocks, segments=segments) == expected


def test_nothing_to_do_is_balanced():
    assert imbalance([0, 0], (1, 1)) == 1.0


def test_what_a_caller_may_not_ask():
    with pytest.raises(UserError, match="2 blocks do not fill 3 stages"):
        best_stages([1, 2], segments=3, pipeline=3)
    for arguments in ({"segments": 3, "pipeline": 2}, {"segments": 0, "pipeline": 1}):
        with pytest.raises(ValueError, match="do not go round"):
            best_stages([1, 2, 3], **arguments)
    with pytest.raises(ValueError, match="negative"):
        best_stages([1, -2], segments=1, pipeline=1)
    with pytest.raises(ValueError, match="stages"):
        stage_costs([1, 2], [1])
    with pytest.raises(ValueError, match="do not fill"):
        equal_stages(1, segments=2)
