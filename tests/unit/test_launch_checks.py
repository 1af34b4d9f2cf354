"""What a launch refuses of a plan before it starts a process, and what it only warns of."""

from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.flce import limits as limits_module
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.argv import Argument
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Verdict, fine, refused, warning
from megacpp_stp.recipe import load_recipe
from megacpp_stp.training import preflight
from megacpp_stp.training.upstream_check import Derived
from tests.unit.machines import CPU_MACHINE, NODE

CPU = build_plan(load_recipe("nam56r-tiny"), device="cpu")


@pytest.fixture
def found(monkeypatch):
    """A launch on a machine that is not here, whose checks give the findings of a test."""

    def judge(*findings, slow=()):
        monkeypatch.setattr(preflight, "look", lambda ask_torch: CPU_MACHINE)
        monkeypatch.setattr(preflight, "_upstream", lambda case: slow)
        listed = (lambda case: findings, preflight._upstream)
        monkeypatch.setattr(preflight, "checks", lambda case, allow_unreviewed: listed)
        preflight.check_plan(CPU)

    return judge


def test_a_launch_raises_the_first_refusal_and_lists_the_others(found):
    first, second = (refused(name, "bad", why="it matters", fix="mend it") for name in "ab")
    with pytest.raises(UserError) as caught:
        found(fine("x", "good"), first, second, slow=[refused("c", "slow", why="w", fix="f")])
    # What takes seconds is not asked any more.
    assert str(caught.value) == "a: bad: it matters\n  fix: mend it\n  also: b: bad: it matters"
    with pytest.raises(UserError, match="c: slow"):
        found(fine("x", "good"), slow=[refused("c", "slow", why="w", fix="f")])


def test_a_launch_says_warnings_and_goes_on(found, capsys):
    found(fine("x", "good"), warning("NVLink", "none", why="slow", fix="buy some"))
    assert capsys.readouterr().err == "megacpp-stp: WARNING: NVLink: none: slow\n  fix: buy some\n"


def test_transformer_engine_must_be_installed_where_a_recipe_names_it():
    plan = build_plan(load_recipe("nam56r"), device="cuda")

    def refusals(plan, **packages):
        left = {key: value for key, value in (NODE.packages | packages).items() if value is not None}
        case = Case(machine=replace(NODE, packages=left), plan=plan)
        return [one.field for one in preflight.check_software(case) if one.verdict is Verdict.REFUSED]

    assert refusals(plan) == []
    assert refusals(plan, **{"transformer-engine": None}) == ["model.backend"]
    assert refusals(build_plan(load_recipe("nam56r-tiny"), device="cuda"), **{"transformer-engine": None}) == []


@pytest.mark.parametrize(
    ("precision", "row", "verdict", "says"),
    [
        ("fp32", None, Verdict.FINE, "on loss and gradients"),
        ("fp32", "False", Verdict.REFUSED, "switches its NaN checks off"),
        ("fp16", "False", Verdict.FINE, "on the loss"),
    ],
)
def test_nan_checks_that_megatron_would_switch_off_are_refused(monkeypatch, precision, row, verdict, says):
    scale = "{initial: 1024.0, minimum: 1.0, window: 100, hysteresis: 2}" if precision == "fp16" else "null"
    overrides = (f"training.precision={precision}", f"training.loss_scale={scale}", "training.checkpoint=null")
    plan = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu")
    rows = [] if row is None else [Derived("check_for_nan_in_loss_and_grad", "True", row, "")]
    monkeypatch.setattr(preflight, "require_accepted", lambda plan: rows)
    *_, last = preflight._upstream(Case(machine=CPU_MACHINE, plan=plan))
    assert (last.name, last.verdict) == ("NaN checks", verdict)
    assert says in last.found


def test_every_check_runs_on_this_machine_and_none_raises(tmp_path):
    """All but the slow one, for a recipe whose data are not there."""
    case = Case(machine=preflight.look(ask_torch=False), plan=CPU, run_dir=tmp_path / "run")
    chosen = [check for check in preflight.checks(case) if check is not preflight._upstream]
    names = [finding.name for check in chosen for finding in check(case)]
    assert {"Python", "torch", "memory", "disk space", "environment", "arguments", "data", "kernels"} <= set(names)
    assert {f"patch {name}" for name in CPU.patches} <= set(names)
    assert len(names) == len(set(names))


def test_an_option_that_a_fused_loss_does_not_go_with_is_named():
    plan = build_plan(load_recipe("nam56r-tiny"), device="cpu")
    preflight._check_fused_loss(plan)
    fusion = replace(plan, arguments=(*plan.arguments, Argument(("--cross-entropy-loss-fusion",), "somewhere")))
    with pytest.raises(UserError, match="--cross-entropy-loss-fusion") as caught:
        preflight._check_fused_loss(fusion)
    assert caught.value.field == "training.fused_cross_entropy"
    # Without the fused loss it is Megatron's own business.
    recipe = load_recipe("nam56r-tiny", ["training.fused_cross_entropy=null"])
    preflight._check_fused_loss(replace(fusion, recipe=recipe))
    assert limits_module.limits(plan.argv) == ()
