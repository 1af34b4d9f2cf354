import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.pattern import FAMILIES, PatternError, parse_pattern


def test_nam56r_has_the_published_counts_and_places():
    pattern = parse_pattern("AEMEAEMEAEMR", depth=52)
    assert pattern.counts == {"A": 13, "M": 13, "E": 22, "R": 4}
    assert pattern.positions("R") == (12, 24, 36, 48)
    assert pattern.positions("A") == tuple(range(1, 52, 4))
    assert str(pattern) == "AEMEAEMEAEMR" * 4 + "AEME"


@given(st.text(alphabet="AMER", min_size=1, max_size=20), st.integers(0, 60))
def test_tiling_keeps_every_block_in_order(source, more):
    depth = len(source) + more
    pattern = parse_pattern(source, depth=depth)
    assert str(pattern) == (source * depth)[:depth]
    assert [block.number for block in pattern.blocks] == list(range(1, depth + 1))
    assert sum(pattern.counts.values()) == depth
    placed = sorted(number for family in FAMILIES for number in pattern.positions(family))
    assert placed == list(range(1, depth + 1))


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("AEX", 2, "no block family"),
        ("CA", 0, "reserved"),
        ("Ae", 1, "upper case"),
        ("AE|ME", 2, "parallel.stages"),
        ("*E", 0, "Megatron symbol"),
        ("", 0, "empty"),
    ],
)
def test_an_error_points_at_the_character(text, position, says):
    with pytest.raises(PatternError, match=says) as caught:
        parse_pattern(text, depth=12)
    assert caught.value.position == position
    shown, caret = str(caught.value).splitlines()[1:3]
    assert caret.index("^") - 4 == position
    assert shown[4:] == text


def test_a_depth_below_one_period_is_refused():
    with pytest.raises(PatternError, match="drop its end"):
        parse_pattern("AEME", depth=3)


@given(st.text(max_size=30), st.integers(-3, 40))
def test_any_text_is_a_pattern_or_our_error(text, depth):
    try:
        pattern = parse_pattern(text, depth=depth)
    except UserError:
        return
    assert len(pattern.blocks) == depth
