"""A mean difference in words: which side of 0 it is on, how large beside the base, and what it stands on."""

import pytest

from megacpp_stp.plan.diff import Difference
from megacpp_stp.runs.bootstrap import Interval
from megacpp_stp.runs.difference import interval_of, relative_to, shown_by
from megacpp_stp.runs.likeness import Likeness, standing


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-2.0, -1.0, "lower"),
        (-2.0, 0.0, "no difference shown"),  # 0 is not outside
        (-1.0, 1.0, "no difference shown"),
        (0.0, 1.0, "no difference shown"),
        (1.0, 2.0, "higher"),
    ],
)
def test_a_difference_is_shown_where_0_is_outside(low, high, said):
    assert shown_by(Interval(low=low, high=high, block_length=None)) == said


def test_without_an_interval_nothing_is_shown():
    assert shown_by(None) == "no interval"


@pytest.mark.parametrize(
    ("base", "difference", "relative"), [(4.0, -1.0, -0.25), (-4.0, -1.0, -0.25), (0.0, 1.0, None), (1e-320, 1.0, None)]
)
def test_a_relative_difference_has_the_sign_of_the_difference(base, difference, relative):
    """Straightness is often negative: more of it is a rise."""
    assert relative_to(base, difference) == relative


def test_two_seeds_are_one_series_and_three_are_three_values():
    two = interval_of([[0.0, 1.0] * 10, [1.0, 2.0] * 10])
    assert two == (interval_of([[0.5, 1.5] * 10])[0], "moving blocks of 6, over 20 iterations of the mean of 2 seeds")
    interval, method = interval_of([[0.0] * 2, [1.0] * 2, [2.0] * 2])
    assert method == "Student's t over 3 seeds"
    assert (interval.low + interval.high) / 2 == pytest.approx(1.0)


def like(*paths, unlike=(), complete=True, changed=()):
    found = tuple(Difference(group="other", path=path, a=1, b=2) for path in paths)
    return Likeness(differences=found, unlike=dict.fromkeys(unlike, ("x",)), complete=complete, changed=changed)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"unlike": ["pattern"]}, "not controlled, unlike pattern"),
        ({"complete": False}, "not controlled: a plan.json is missing, so that not all could be compared"),
        ({"changed": ("b",)}, "not controlled: b went on with another plan"),
        ({"paths": ["optimizer.lr"]}, "not controlled: optimizer.lr differs too"),
        ({"paths": ["stp.weight"]}, "controlled: only stp.n_spans, stp.weight differ"),
    ],
)
def test_what_is_true_of_one_pair_is_said_of_all(second, words):
    second = like(*second.pop("paths", []), **second)
    assert standing([like("stp.n_spans"), second]) == words
    assert standing([second, like("stp.n_spans")]).split(":")[0] == words.split(":")[0]
