"""STP's policy: when, how much, where; and how it travels as arguments."""

from argparse import ArgumentParser

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.stp.config import FINAL_NORM, StpConfig, read_taps, tap_name, write_taps
from megacpp_stp.training.arguments import add_nam_arguments, stp_config


def config(**settings):
    return StpConfig(**{"weight": 0.5, "n_spans": 1, "start_step": 10, "taps": (3,), "seed": 0} | settings)


def test_the_weight_begins_at_the_gate():
    policy = config()
    assert [policy.weight_at(i) for i in (0, 9, 10, 11, 10**6)] == [0, 0, 0.5, 0.5, 0.5]
    assert [policy.is_active(i) for i in (9, 10)] == [False, True]


def test_the_ramp_rises_by_equal_steps_to_the_weight():
    policy = config(weight=0.8, ramp_steps=4)
    assert [policy.weight_at(i) for i in range(9, 16)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert policy.weight_at(13) == 0.8  # to the bit
    assert policy.is_active(10)


@pytest.mark.parametrize("ramp", [0, 1])
def test_a_ramp_of_one_step_is_none(ramp):
    assert config(ramp_steps=ramp).weight_at(10) == 0.5


def test_weight_zero_is_never_active():
    policy = config(weight=0.0, ramp_steps=3)
    assert not any(policy.is_active(i) or policy.weight_at(i) for i in range(30))


def test_every_so_many_iterations_are_diagnosed_counted_from_one():
    policy = config(diagnose_every=5)
    assert [i + 1 for i in range(12) if policy.is_diagnosed(i)] == [5, 10]
    assert not any(config().is_diagnosed(i) for i in range(12))


@pytest.mark.parametrize(
    ("taps", "families", "text"),
    [
        ((3,), (), "3"),
        ((3, 12), ("M", "R"), "3:M,12:R"),
        ((3, FINAL_NORM), ("M", "final-norm"), "3:M,final-norm"),
        ((FINAL_NORM,), ("final-norm",), "final-norm"),
    ],
)
def test_taps_travel_as_text(taps, families, text):
    assert write_taps(config(taps=taps, families=families)) == text
    assert read_taps(text) == (taps, families)


@pytest.mark.parametrize("text", ["", "0", "-1", "3,3", "3:M,3:M", "final", "M:3", "final-norm,final-norm", "3:M,"])
def test_text_that_names_no_taps_is_refused(text):
    with pytest.raises(ValueError):
        read_taps(text)


def test_the_arguments_of_a_plan_are_its_policy():
    overrides = [
        "stp={objective: triple, weight: 0.25, n_spans: 2, max_span: 9, within_documents: true, start_step: 7, "
        "ramp_steps: 3, taps: [2, final-norm, {family: A, last: 1}], seed: 99, diagnose_every: 20}"
    ]
    argv = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu").argv
    parser = add_nam_arguments(ArgumentParser())
    args, _ = parser.parse_known_args([*argv, "--nam-plan", "p", "--nam-run-dir", "d"])
    assert stp_config(args) == StpConfig(
        weight=0.25,
        n_spans=2,
        max_span=9,
        within_documents=True,
        start_step=7,
        ramp_steps=3,
        taps=(2, 9, FINAL_NORM),
        families=("E", "A", "final-norm"),
        seed=99,
        diagnose_every=20,
    )
    assert tap_name(FINAL_NORM) == "final-norm"


def test_without_taps_there_is_no_policy():
    argv = build_plan(load_recipe("nam56r-tiny", ["stp=null"]), device="cpu").argv
    args, _ = add_nam_arguments(ArgumentParser()).parse_known_args([*argv, "--nam-plan", "p", "--nam-run-dir", "d"])
    assert stp_config(args) is None
