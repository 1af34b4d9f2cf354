"""``training.health``: from the recipe's keys to the words of a run that its own numbers or a wait have ended."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.changes import check_changes
from megacpp_stp.plan.health import NO_CHECKS
from megacpp_stp.preflight.inputs import check_arguments
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.totals import Totals
from megacpp_stp.stp.meter import Meter
from megacpp_stp.training.finite import Finite, NonFinite
from megacpp_stp.training.gradients import GradientCheck, parameter_names
from megacpp_stp.training.health import outlast_suspensions

SKIP = "training.health={nonfinite: skip, most_skipped: 3, hang_minutes: 10}"


def plan_of(*overrides):
    return build_plan(load_recipe("nam56r-tiny", overrides), device="cpu")


# --- the recipe ---


@pytest.mark.parametrize(
    ("minutes", "limit"), [("10", "31"), ("0.05", "31"), ("30", "31"), ("30.5", "32"), ("90", "91"), ("10080", "10081")]
)
def test_megatrons_own_limit_is_the_later_one(minutes, limit):
    argv = plan_of(f"training.health.hang_minutes={minutes}").argv
    assert argv[argv.index("--distributed-timeout-minutes") + 1] == limit


def test_under_our_watchdog_that_limit_outlasts_a_suspension():
    """Torch's clock goes on while its process is stopped."""
    args = SimpleNamespace(distributed_timeout_minutes=31)
    outlast_suspensions(plan_of("training.health.hang_minutes=45.5").as_dict(), args)
    assert args.distributed_timeout_minutes == 46 + 7 * 24 * 60
    assert type(args.distributed_timeout_minutes) is int  # gloo and NCCL count milliseconds
    assert args.distributed_timeout_minutes * 60_000 < 2**31


def test_upstreams_checks_are_off_only_where_steps_are_skipped():
    stop, skip = plan_of(), plan_of(SKIP)
    assert NO_CHECKS not in stop.argv
    assert skip.argv.count(NO_CHECKS) == 1
    assert "NaN checks on" in check_arguments(stop)
    assert "NaN checks ours" in check_arguments(skip)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("training.health.nonfinite=skip",), "training.health.most_skipped"),
        (("training.health.most_skipped=3",), "training.health.most_skipped"),
        ((SKIP, "training.health.most_skipped=0"), "training.health.most_skipped"),
        (("training.health.hang_minutes=0",), "training.health.hang_minutes"),
        (("training.health.hang_minutes=null",), "training.health.hang_minutes"),
        (("training.health.nonfinite=warn",), "training.health.nonfinite"),
        (("megatron.distributed-timeout-minutes=5",), "megatron.distributed-timeout-minutes"),
        (("megatron.distributed-timeout-minutes=500",), "megatron.distributed-timeout-minutes"),
    ],
)
def test_what_says_nothing_or_two_things_is_refused(overrides, field):
    with pytest.raises(UserError) as caught:
        plan_of(*overrides)
    assert caught.value.field.endswith(field)
    assert caught.value.fix


def test_a_run_may_go_on_with_another_policy():
    """For what ended it."""
    check_changes(plan_of().as_dict(), plan_of(SKIP).as_dict(), allowed=True)


# --- what a rank sees ---


class Optimizer:
    """With fp16's scale."""

    def __init__(self, scale):
        self.scale, self.steps, self.norm = scale, 0, 1.0

    def scale_loss(self, loss):
        return loss

    def get_loss_scale(self):
        return torch.tensor([self.scale])

    def step(self):
        self.steps += 1
        return True, self.norm, None


class Group:
    """Of gradients that are reduced together, as Megatron's DDP has it."""

    def __init__(self, parameters, *, upstream):
        self.reduced = 0
        self.ddp_config = SimpleNamespace(check_for_nan_in_grad=upstream)
        self.buckets = [SimpleNamespace(params=parameters, params_with_extra_main_grads=[], grad_data=torch.zeros(()))]

    def fill(self, value):
        for parameter in self.buckets[0].params:
            parameter.main_grad = torch.full((2,), value)
        self.buckets[0].grad_data = torch.full((4,), value)

    def start_grad_sync(self, force_all_reduce=False):
        if self.ddp_config.check_for_nan_in_grad and not self.buckets[0].grad_data.norm().isfinite():
            raise RuntimeError("upstream's words")
        self.reduced += 1


class Model(nn.Module):
    """Wrapped as Megatron wraps it: a layer with its global number, and one parameter outside of the layers."""

    def __init__(self, *, upstream=False):
        super().__init__()
        layer = nn.Linear(1, 1, bias=False)
        layer.layer_number = 7
        inner = nn.Module()
        inner.embedding = nn.Linear(1, 1, bias=False)
        inner.decoder = nn.Module()
        inner.decoder.layers = nn.ModuleList([layer])
        self.module = nn.Module()
        self.module.module = inner
        self.bucket_groups = [Group(list(self.parameters()), upstream=upstream)]
        self.expert_parallel_bucket_groups = []


def test_parameters_are_named_with_the_global_number_of_their_layer():
    assert list(parameter_names(Model()).values()) == ["embedding.weight", "decoder.layers.0.weight (layer 7)"]


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, None),
        (
            torch.nan,
            "gradient is not finite on a stage: 2 of 2 parameters, the first embedding.weight, the last decoder",
        ),
        (
            -torch.inf,
            "gradient is not finite on a stage: 2 of 2 parameters, the first embedding.weight, the last decoder",
        ),
        (1e30, "norm of the gradient is not finite on a stage: its numbers are, the largest is in embedding.weight"),
    ],
)
def test_gradients_are_looked_at_before_they_are_reduced(upstream, value, words):
    model, found = Model(upstream=upstream), []
    (group,) = model.bucket_groups
    GradientCheck(wanted=lambda: True, found=found.append).watch(model, stage="a stage")
    group.fill(value)
    if upstream and words:
        with pytest.raises(RuntimeError, match="upstream's words"):
            group.start_grad_sync(force_all_reduce=True)
    else:
        group.start_grad_sync(force_all_reduce=True)
        assert group.reduced == 1
    assert [text[: len(words)] for text in found] == ([words] if words else [])


def test_gradients_of_experts_are_looked_at_too():
    """Megatron keeps them in groups of their own: they are reduced over other ranks."""
    model, found = Model(), []
    model.bucket_groups, model.expert_parallel_bucket_groups = [], model.bucket_groups
    (group,) = model.expert_parallel_bucket_groups
    GradientCheck(wanted=lambda: True, found=found.append).watch(model, stage="a stage")
    group.fill(torch.nan)
    group.start_grad_sync()
    assert len(found) == 1


def test_an_error_of_the_reduction_itself_stays_one():
    model, found = Model(upstream=True), []
    (group,) = model.bucket_groups

    def broken(**kwargs):
        raise RuntimeError("connection closed")

    group.start_grad_sync = broken
    GradientCheck(wanted=lambda: True, found=found.append).watch(model, stage="a stage")
    group.fill(1.0)
    with pytest.raises(RuntimeError, match="connection closed"):
        group.start_grad_sync()
    assert found == []


class Seen:
    """A rank's eyes on a model of one group of gradients, alone in its world."""

    def __init__(self, monkeypatch, *, most_skipped=None, scale=None, lowest=None, in_a_row=0):
        monkeypatch.setattr("megacpp_stp.training.finite._stage", lambda chunk: f"stage {chunk}")
        monkeypatch.setattr("megacpp_stp.training.finite.gather", lambda value: [value])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        self.optimizer = Optimizer(1.0 if scale is None else scale)
        self.config = SimpleNamespace(finalize_model_grads_func=self._reduce, grad_scale_func=self.optimizer.scale_loss)
        self.finite = Finite(
            device=torch.device("cpu"),
            iteration=lambda: 4,
            most_skipped=most_skipped,
            in_a_row=in_a_row,
            lowest_scale=lowest,
        )
        self.finite.install(self.config)
        self.model = Model()

    def _reduce(self, model):
        for group in model[0].bucket_groups:
            group.start_grad_sync()

    def step(self, gradient=1.0):
        self.finite.watch(self.model)
        self.finite.loss(torch.ones(()), training=True)
        self.model.bucket_groups[0].fill(gradient)
        self.config.finalize_model_grads_func([self.model])
        return self.optimizer.step()[0]


def test_steps_in_a_row_are_counted_and_one_too_many_ends_the_run(monkeypatch, capsys):
    seen = Seen(monkeypatch, most_skipped=2)
    nan = torch.nan
    assert [seen.step(value) for value in (1.0, nan, nan, 1.0, nan, nan)] == [True, False, False, True, False, False]
    assert seen.optimizer.steps == 2
    assert capsys.readouterr().err.count("iteration 5 is skipped: rank 0: gradient is not finite on stage 0") == 4
    with pytest.raises(NonFinite, match=r"^iteration 5: rank 0: gradient is not.*; 2 steps in a row were skipped"):
        seen.step(nan)


def test_the_row_goes_on_after_a_restart(monkeypatch):
    with pytest.raises(NonFinite):
        Seen(monkeypatch, most_skipped=2, in_a_row=2).step(torch.nan)


@pytest.mark.parametrize("most_skipped", [None, 1])
def test_an_overflow_of_fp16_is_left_to_the_scale_until_that_cannot_fall(monkeypatch, most_skipped):
    seen = Seen(monkeypatch, most_skipped=most_skipped, scale=8.0, lowest=1.0)
    for seen.optimizer.scale in (8.0, 2.0):
        assert seen.step(torch.inf)  # upstream's optimizer, which would refuse it, was asked
    seen.optimizer.scale = 1.0
    if most_skipped:
        assert not seen.step(torch.inf)
        assert seen.finite.told({"lm_loss": 2.0, "tokens": 3}) == {"nonfinite": "gradient", "lm_loss": None}
    else:
        with pytest.raises(NonFinite, match="^iteration 5: gradient is not finite on stage 0"):
            seen.step(torch.inf)


@pytest.mark.parametrize("most_skipped", [None, 1])
def test_a_norm_that_only_the_reduction_spoils_ends_the_run(monkeypatch, most_skipped):
    """The step is taken by then, and cannot be skipped."""
    seen = Seen(monkeypatch, most_skipped=most_skipped)
    seen.optimizer.norm = float("inf")
    with pytest.raises(NonFinite, match="norm of the reduced gradient is inf"):
        seen.step()


@pytest.mark.parametrize("most_skipped", [None, 1])
def test_an_evaluation_that_is_not_finite_ends_the_run(monkeypatch, most_skipped):
    with pytest.raises(NonFinite, match="^iteration 5: lm loss of the evaluation after it is nan$"):
        Seen(monkeypatch, most_skipped=most_skipped).finite.loss(torch.tensor(torch.nan), training=False)


def test_a_gradient_is_told_by_the_stp_loss_that_spoils_it(monkeypatch):
    seen = Seen(monkeypatch)
    meter = Meter([3, 0, 5])
    one = torch.ones(())
    for tap, loss in ((3, one), (0, one * torch.nan)):
        meter.add(tap, loss=loss, valid=one, triples=1)
    assert meter.nonfinite() == (0,)
    seen.finite.observe_stp(SimpleNamespace(meter=meter))
    with pytest.raises(NonFinite, match="^iteration 5: STP loss after final-norm is not finite$") as caught:
        seen.step(torch.nan)
    assert caught.value.cause == "stp_loss"


def test_totals_count_them_and_the_row_they_stand_in():
    ok, bad = {"skipped": False}, {"skipped": True, "nonfinite": "gradient"}
    overflow = {"skipped": True, "nonfinite": None}
    totals = Totals(started="1970-01-01T00:01:40+00:00", records=[bad, ok, bad, overflow])
    assert totals.nonfinite_in_a_row == 1
    found = totals.after(bad, now=200.0)
    assert (found["skipped_iterations"], found["nonfinite_iterations"]) == (4, 3)
    assert totals.nonfinite_in_a_row == 2
