"""What a launch refuses of a plan before it starts a process, and what it only warns of."""

from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.flce import limits as limits_module
from megacpp_stp.patches.judge import State
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


ASKED_OF_EVERY_RUN = {
    *("Python", "import torch", "torch", "megatron-core", "transformers", "tokenizers", "triton"),
    *("transformer-engine", "mamba-ssm", "causal-conv1d", "cut-cross-entropy", "apex"),
    *("shared memory", "run directory", "disk space", "checkpoint"),
    *("recipe", "environment", "arguments", "data", "kernels", "fused loss", "Megatron's word", "NaN checks"),
}
ASKED_OF_GPUS = {"CUDA", "driver", "GPUs", "NVLink", "GPU memory", "placement", "loading checkpoints"}


@pytest.fixture
def all_findings(monkeypatch, tmp_path):
    """Of a run that goes on on this machine, by name."""

    def judge(plan, machine):
        monkeypatch.setattr(preflight, "require_accepted", lambda plan: [])
        folder = tmp_path / "checkpoints" / "iter_0000100"
        folder.mkdir(parents=True, exist_ok=True)
        case = Case(machine=machine, plan=plan, run_dir=tmp_path, from_iteration=100)
        return {finding.name: finding for check in preflight.checks(case) for finding in check(case)}

    return judge


def test_nothing_of_the_list_is_left_out(all_findings):
    """What a launch must know of its machine, its place, its data and its plan before it starts."""
    found = all_findings(CPU, CPU_MACHINE)
    assert ASKED_OF_EVERY_RUN | {"memory"} | {f"patch {name}" for name in CPU.patches} <= found.keys()
    assert not ASKED_OF_GPUS & found.keys()
    large = build_plan(load_recipe("nam56r", ("launch.nodes=2",)), device="cuda")
    found = all_findings(large, NODE)
    assert ASKED_OF_EVERY_RUN | ASKED_OF_GPUS | {f"patch {name}" for name in large.patches} <= found.keys()


def test_whatever_is_refused_says_why_and_how_to_mend_it(all_findings, monkeypatch):
    """On a machine that has nothing, of data and a checkpoint that are not there."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    large = build_plan(load_recipe("nam56r", ("launch.processes_per_node=4", "launch.nodes=2")), device="cuda")
    bare = replace(CPU_MACHINE, packages={}, usable=0, torch_cuda=None, apex="another project's")
    bad = [finding for finding in all_findings(large, bare).values() if finding.verdict is not Verdict.FINE]
    assert {"torch", "GPUs", "data", "checkpoint", "kernels", "placement (expert)", "environment"} <= {
        finding.name for finding in bad
    }
    assert [finding.name for finding in bad if not (finding.found and finding.why and finding.fix)] == []


def test_a_launch_warns_of_groups_over_nodes(monkeypatch, capsys):
    plan = build_plan(load_recipe("nam56r", ("launch.processes_per_node=4", "launch.nodes=2")), device="cuda")
    monkeypatch.setattr(preflight, "look", lambda ask_torch: NODE)
    with pytest.raises(UserError):  # of its data, for one
        preflight.check_plan(plan)
    said = capsys.readouterr().err
    assert "WARNING: placement (expert): expert parallelism exchanges something in every layer, and its groups" in said


def test_an_upstream_that_nobody_reviewed_is_refused_before_anything_starts(monkeypatch):
    """By the launch, in the same words as by each rank."""
    case = Case(machine=CPU_MACHINE, plan=CPU)
    assert {finding.verdict for finding in preflight._patches(CPU, ())} == {Verdict.FINE}
    real = preflight.Registry.examine

    def examine(registry, plan, **settings):
        first, *rest = real(registry, plan, **settings)
        return [replace(first, state=State.REFUSED, reason="changed upstream"), *rest]

    monkeypatch.setattr(preflight.Registry, "examine", examine)
    check = next(check for check in preflight.checks(case) if any(one.name.startswith("patch ") for one in check(case)))
    refused_one, *others = check(case)
    assert refused_one.verdict is Verdict.REFUSED and refused_one.why and refused_one.fix
    assert {finding.verdict for finding in others} <= {Verdict.FINE}


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
