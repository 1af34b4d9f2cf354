"""Surface `fp32-groups`: which parameters it parts from the others, and which plans list it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides
from megatron.training import training

from megacpp_stp.patches import fp32_groups
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.records import PatchRefused
from megacpp_stp.patches.registry import Activation, Registry
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import list_recipes, load_recipe
from tests.unit.patch_surfaces import CORE

WEIGHT_DECAY = {"start_weight_decay": 0.1, "end_weight_decay": 0.2}
BF16 = build_plan(
    load_recipe("nam56r-tiny", ("training.precision=bf16", "training.checkpoint=null")), device="cpu"
).as_dict()


def activate(**plan: object) -> Activation:
    return Registry.load().activate({**BF16, "patches": ["fp32-groups"], **plan}, core=CORE)


def overrides_of(*, bf16: bool = False, fp16: bool = False, **more: object):
    args = SimpleNamespace(bf16=bf16, fp16=fp16, **WEIGHT_DECAY, **more)
    with activate():
        return training.get_megatron_optimizer_config(args)


def override_of(name: str, parameter: torch.Tensor, overrides: dict) -> dict:
    return combine_param_group_overrides([value for key, value in overrides.items() if key.matches(parameter, name)])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp32_parameters_are_parted_with_the_weight_decay_that_they_have(precision):
    _, overrides = overrides_of(**{precision: True})
    same = {"start_wd": 0.1, "end_wd": 0.2}
    assert override_of("a.D", torch.zeros(3), overrides) == {"wd_mult": 0.0, **same}
    assert override_of("a.B_bias", torch.zeros(3, 2), overrides) == same
    assert override_of("a.norm", torch.zeros(3, dtype=torch.bfloat16), overrides) == {"wd_mult": 0.0}
    assert override_of("a.weight", torch.zeros(3, 2, dtype=torch.half), overrides) == {}


def test_an_fp32_model_has_the_groups_that_it_had():
    config, overrides = overrides_of(lr=0.25)
    assert config.lr == 0.25
    assert list(overrides.values()) == list(get_standard_config_overrides(OptimizerConfig()).values())


def test_the_real_consumers_find_it_and_undo_restores_the_original():
    original = training.get_megatron_optimizer_config
    consumer = training.setup_model_and_optimizer
    with activate() as active:
        assert [record.state for record in active.records] == [State.ACTIVE]
        replacement = consumer.__globals__["get_megatron_optimizer_config"]
        assert replacement is training.get_megatron_optimizer_config is not original
    assert consumer.__globals__["get_megatron_optimizer_config"] is original


@pytest.mark.parametrize(
    "override",
    [
        lambda of, args: {},
        lambda of, args: {key: {**value, "end_wd": 0.0} for key, value in of(args).items()},
        lambda of, args: {ParamKey(predicate=ParamPredicate("all", lambda p: True)): v for v in of(args).values()},
    ],
    ids=["nothing more", "another weight decay", "every parameter"],
)
def test_its_probe_sees_what_is_wrong(override, monkeypatch):
    monkeypatch.setattr(fp32_groups, "_fp32_override", partial(override, fp32_groups._fp32_override))
    with pytest.raises(PatchRefused, match=r"refused: a torch\.b?float\d\d parameter of 1 dimensions"):
        activate()


def test_a_plan_that_does_not_need_it_is_refused():
    fp32 = {**BF16["recipe"], "training": {**BF16["recipe"]["training"], "precision": "fp32"}}
    with pytest.raises(PatchRefused, match="all its parameters are fp32"):
        activate(recipe=fp32)
    with pytest.raises(PatchRefused, match="no layer of it keeps fp32 parameters"):
        activate(layout={"layers": [layer for layer in BF16["layout"]["layers"] if layer["family"] in "AE"]})


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plans_list_what_the_predicates_ask_for(name, precision):
    """The planner lists surfaces without importing their code; both must say the same."""
    families = load_recipe(name).model.families
    # The authors' kernels are for bf16 alone.
    torch = tuple(
        f"model.families.{letter}.kernel=torch" for letter in "MR" if hasattr(getattr(families, letter), "kernel")
    )
    overrides = (f"training.precision={precision}", "training.checkpoint=null", *torch)
    plan = build_plan(load_recipe(name, overrides)).as_dict()
    registry = Registry.load()
    wanted = {id for id in registry.ledger if registry.surface(id).unneeded(plan) is None}
    assert set(plan["patches"]) == wanted
