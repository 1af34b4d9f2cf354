"""Patch `fp32-groups`: which parameters it parts from the others, and that a plan asks for it where it is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides
from megatron.training import training

from megacpp_stp.patches import fp32_groups, surface
from megacpp_stp.patches.fp32_groups import SURFACE, apply

WEIGHT_DECAY = {"start_weight_decay": 0.1, "end_weight_decay": 0.2}


def overrides_of(*, bf16: bool = False, fp16: bool = False, **more: object):
    args = SimpleNamespace(bf16=bf16, fp16=fp16, **WEIGHT_DECAY, **more)
    with apply():
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


def test_undo_restores_the_original_by_identity():
    original = training.get_megatron_optimizer_config
    with apply() as patch:
        assert training.get_megatron_optimizer_config is not original
        assert patch.state == "applied"
        training.get_megatron_optimizer_config(SimpleNamespace(bf16=False, fp16=False))
        assert patch.state == "reached"
    assert training.get_megatron_optimizer_config is original


def test_another_upstream_is_refused(monkeypatch):
    monkeypatch.setattr(surface, "version", lambda name: "0.20.0")
    with pytest.raises(ValueError, match="the patch is for megatron-core >=0.19.2,<0.20"):
        fp32_groups.apply()


def test_the_ledger_says_what_the_code_says():
    entry = yaml.safe_load((Path(__file__).parents[2] / "patches" / f"{SURFACE.id}.yaml").read_text())
    assert (entry["id"], entry["target"], entry["upstream"]) == (SURFACE.id, SURFACE.target, SURFACE.upstream)
    assert tuple(entry["consumers"]) == SURFACE.consumers
