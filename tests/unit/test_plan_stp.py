"""Where the taps of a recipe are, and which STP keys fit together."""

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.render import explain
from megacpp_stp.recipe import load_recipe

# AEMEAEMEAEMR, one Megatron layer a block
TINY = "nam56r-tiny"


def plan_of(*overrides, name=TINY):
    return build_plan(load_recipe(name, overrides), device="cpu")


def taps_of(taps, *overrides):
    return plan_of(f"stp.taps={taps}", *overrides).layout.tap_names


@pytest.mark.parametrize(
    ("taps", "names"),
    [
        ("[6, 12]", ("6:E", "12:R")),
        ("[final]", ("12:R",)),
        ("[final-norm]", ("final-norm",)),
        ("[final-norm, 3]", ("3:M", "final-norm")),
        ("[final, final-norm]", ("12:R", "final-norm")),
        ("[{family: A, last: 3}]", ("1:A", "5:A", "9:A")),
        ("[{family: E, last: 2}]", ("8:E", "10:E")),
        ("[{family: M, last: 1}, 1, final]", ("1:A", "11:M", "12:R")),
    ],
)
def test_a_place_becomes_layer_numbers_of_this_pattern(taps, names):
    assert taps_of(taps) == names


def test_a_block_of_two_layers_is_read_after_its_second():
    """An attention block with a dense MLP is two Megatron layers."""
    dense = "model.families.A.dense_mlp=true"
    assert taps_of("[{family: A, last: 3}]", dense) == ("2:A", "7:A", "12:A")
    assert taps_of("[final]", dense) == ("15:R",)
    assert taps_of("[1, 2]", dense) == ("1:A", "2:A")


def test_multi_token_prediction_is_never_tapped():
    """Its layers come after the last of the decoder and have numbers from 1 again."""
    mtp = "model.mtp={depths: 1, pattern: AE, loss_coeff: 0.1}"
    layout = plan_of("stp.taps=[1, final, final-norm, {family: E, last: 1}]", mtp).layout
    assert layout.tap_names == ("1:A", "10:E", "12:R", "final-norm")
    assert [layer.number for layer in layout.layers if layer.tapped] == [1, 10, 12]
    assert layout.mtp
    assert not any(layer.tapped for layer in layout.mtp)


@pytest.mark.parametrize(
    ("taps", "what"),
    [
        ("[13]", "layer 13 does not exist"),
        ("[12, 6]", "must rise"),
        ("[6, 6]", "must rise"),
        ("[final, final]", "layer 12 is asked for twice"),
        ("[12, final]", "layer 12 is asked for twice, by 12 and final"),
        ("[final-norm, final-norm]", "final-norm is asked for twice"),
        ("[9, {family: A, last: 1}]", "by 9 and {family: A, last: 1}"),
        ("[{family: A, last: 2}, {family: A, last: 1}]", "layer 9 is asked for twice"),
        ("[{family: A, last: 4}]", "3 blocks of family A"),
        ("[{family: R, last: 2}]", "1 blocks of family R"),
        ("[0]", "no place"),
        ("[1.5]", "no place"),
        ("[last]", "no place"),
        ("[{family: A}]", "no place"),
        ("[{family: X, last: 1}]", "no place"),
        ("[]", "no list of places"),
        ("final", "no list of places"),
    ],
)
def test_a_place_that_is_none_is_refused(taps, what):
    with pytest.raises(UserError, match=what) as caught:
        plan_of(f"stp.taps={taps}")
    assert "stp.taps" in caught.value.field
    assert caught.value.fix


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["stp.max_span=1"], "stp.max_span"),
        (["stp.max_span=16", "stp.objective=chord"], "stp.max_span"),
        (["stp.objective=line"], "stp.objective"),
        (["stp.ramp_steps=151"], "stp.ramp_steps"),
        (["stp.ramp_steps=-1"], "stp.ramp_steps"),
        (["stp.diagnose_every=-1"], "stp.diagnose_every"),
        (["stp.start_step=300"], "stp.start_step"),
        # 4 positions a span of a chord, 3 of a triple; 2 sequences
        (["stp.objective=chord", "stp.n_spans=513"], "stp.n_spans"),
        (["stp.n_spans=683"], "stp.n_spans"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides, field):
    with pytest.raises(UserError) as caught:
        plan_of(*overrides)
    assert caught.value.field.endswith(field)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stp.ramp_steps=150"],
        ["stp.ramp_steps=200", "stp.weight=0"],
        ["stp.max_span=2"],
        ["stp.max_span=1000000"],
        ["stp.objective=chord", "stp.n_spans=512", "stp.within_documents=true"],
        ["stp.n_spans=682"],
    ],
)
def test_the_last_value_that_fits_is_taken(overrides):
    assert plan_of(*overrides).argv


def test_every_stp_key_is_in_the_argv_with_its_field():
    plan = plan_of(
        "stp.objective=triple", "stp.max_span=16", "stp.within_documents=true", "stp.ramp_steps=10", "stp.weight=0.5"
    )
    said = {argument.field.split(",")[0]: argument.tokens for argument in plan.arguments if "stp" in argument.field}
    assert said == {
        "stp.objective": ("--nam-stp-objective", "triple"),
        "stp.weight": ("--nam-stp-weight", "0.5"),
        "stp.n_spans": ("--nam-stp-n-spans", "4"),
        "stp.max_span": ("--nam-stp-max-span", "16"),
        "stp.within_documents": ("--nam-stp-within-documents",),
        "stp.start_step": ("--nam-stp-start-step", "150"),
        "stp.ramp_steps": ("--nam-stp-ramp-steps", "10"),
        "stp.taps": ("--nam-stp-taps", "6:E,12:R"),
        "stp.seed": ("--nam-stp-seed", "1234"),
        "stp.diagnose_every": ("--nam-stp-diagnose-every", "0"),
    }
    assert any("--nam-stp-max-span 16" in line and "stp.max_span = 16" in line for line in explain(plan))
