"""What a launch refuses of a plan before it starts a process."""

import importlib.util
from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.flce import limits as limits_module
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.argv import Argument
from megacpp_stp.recipe import load_recipe
from megacpp_stp.training import preflight


@pytest.mark.parametrize("there", [False, True])
def test_transformer_engine_must_be_installed_where_a_recipe_names_it(monkeypatch, there):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    preflight._check_backend(build_plan(load_recipe("nam56r-tiny"), device="cuda"))
    plan = build_plan(load_recipe("nam56r"), device="cuda")
    if there:
        preflight._check_backend(plan)
        return
    with pytest.raises(UserError, match="not installed") as caught:
        preflight._check_backend(plan)
    assert caught.value.field == "model.backend"


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
