"""What STP refuses, and that it feeds the auxiliary losses that were on Megatron's scale hook before it."""

from __future__ import annotations

from dataclasses import make_dataclass

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.scale import HOOK, install_scale_hook
from megacpp_stp.stp.seam import GradScale
from megacpp_stp.stp.taps import StpTaps
from tests.parity.model import transformer_config


@pytest.fixture
def config(monkeypatch):
    """Megatron's own configuration; the scales that upstream keeps on classes are put back afterwards."""
    for scaler in (MoEAuxLossAutoScaler, DSAIndexerLossAutoScaler):
        monkeypatch.setattr(scaler, "main_loss_backward_scale", None)
    return transformer_config(pipeline=1)


def finish_forward(config, *, num_microbatches):
    """The part of Megatron's schedule that runs after each forward step, on a stage that is not the last."""
    schedules.forward_step_calc_loss(
        None, torch.zeros(1), None, config, None, False, num_microbatches, [], cp_group_size=1, is_last_stage=False
    )


# --- the scale hook ---------------------------------------------------------------------------------


def test_a_hook_that_was_there_is_called_after_stp_with_the_same_value(config):
    scale, seen = GradScale(), []
    setattr(config, HOOK, lambda value: seen.append((value.item(), scale.get().item())))
    install_scale_hook(config, scale)
    for value in (0.25, 4.0):
        getattr(config, HOOK)(torch.tensor([value]))
    assert seen == [(0.25, 0.25), (4.0, 4.0)]


def test_installed_twice_both_scales_are_fed(config):
    first, second = GradScale(), GradScale()
    install_scale_hook(config, first)
    install_scale_hook(config, second)
    getattr(config, HOOK)(torch.tensor([0.5]))
    assert (first.get().item(), second.get().item()) == (0.5, 0.5)


def test_the_sparse_attention_indexer_still_gets_its_scale(config):
    """With an empty slot upstream would choose the indexer's scaler: filling the slot must not take that away."""
    config.experimental_attention_variant = "dsa"
    assert schedules._get_experimental_attention_variant_loss_scale_func(config) is (
        DSAIndexerLossAutoScaler.set_loss_scale
    )
    scale = GradScale()
    install_scale_hook(config, scale)
    for value in (0.25, 4.0):
        getattr(config, HOOK)(torch.tensor([value]))
        assert DSAIndexerLossAutoScaler.main_loss_backward_scale.item() == value
        assert scale.get().item() == value


def test_a_hook_of_the_users_own_stands_in_for_the_indexers(config):
    """As upstream has it: a filled slot wins over the default."""
    seen = []
    config.experimental_attention_variant = "dsa"
    setattr(config, HOOK, seen.append)
    install_scale_hook(config, GradScale())
    getattr(config, HOOK)(torch.tensor([0.5]))
    assert seen == [torch.tensor([0.5])]
    assert DSAIndexerLossAutoScaler.main_loss_backward_scale is None


def test_without_sparse_attention_nothing_else_is_fed(config):
    scale = GradScale()
    install_scale_hook(config, scale)
    getattr(config, HOOK)(torch.tensor([0.5]))
    assert scale.get().item() == 0.5
    assert DSAIndexerLossAutoScaler.main_loss_backward_scale is None


def test_upstreams_schedule_feeds_all_three_the_same_scale(config):
    """Loss scale 8 over 4 microbatches: 2 for the experts' loss, the indexer's and STP's."""
    config.experimental_attention_variant = "dsa"
    config.grad_scale_func = lambda loss: loss * 8.0
    scale = GradScale()
    install_scale_hook(config, scale)
    finish_forward(config, num_microbatches=4)
    assert scale.get().item() == 2.0
    assert DSAIndexerLossAutoScaler.main_loss_backward_scale.item() == 2.0
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.item() == 2.0


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("calculate_per_token_loss", True, "--calculate-per-token-loss"),
        ("context_parallel_size", 2, "parallel"),
        ("sequence_parallel", True, "parallel"),
    ],
)
def test_modes_whose_scale_is_not_proven_are_refused_and_left_alone(config, setting, value, field):
    setattr(config, setting, value)
    with pytest.raises(UserError, match="not proven yet") as caught:
        install_scale_hook(config, GradScale())
    assert caught.value.field == field
    assert getattr(config, HOOK) is None


def test_a_megatron_without_the_hook_is_refused():
    older = make_dataclass("OlderConfig", [("calculate_per_token_loss", bool, False), ("num_layers", int, 1)])()
    with pytest.raises(UserError, match="no hook for auxiliary loss scales"):
        install_scale_hook(older, GradScale())
    assert not hasattr(older, HOOK)


# --- attaching the taps -----------------------------------------------------------------------------


class Stack(torch.nn.Module):
    """A stage with layers 3 and 4."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        for number, layer in enumerate(self.layers, start=3):
            layer.layer_number = number


def attach(config):
    stack = Stack(config)
    settings = StpConfig(weight=1.0, n_spans=1, start_step=0, taps=(2, 4), seed=0)
    return stack, StpTaps(settings, iteration=lambda: 0, data_rank=0).attach(stack)


def test_only_the_tapped_layers_of_this_stage_get_a_hook(config):
    stack, tapped = attach(config)
    assert tapped == (4,)
    assert [len(layer._forward_hooks) for layer in stack.layers] == [0, 1]


def test_selective_recomputation_is_fine(config):
    config.recompute_granularity = "selective"
    assert attach(config)[1] == (4,)


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("recompute_granularity", "full", "--recompute-granularity"),
        ("cuda_graph_impl", "local", "--cuda-graph-impl"),
        ("cuda_graph_impl", "transformer_engine", "--cuda-graph-impl"),
        ("cuda_graph_impl", "full_iteration", "--cuda-graph-impl"),
    ],
)
def test_modes_that_pass_a_layers_hooks_by_are_refused(config, setting, value, field):
    setattr(config, setting, value)
    with pytest.raises(UserError) as caught:
        attach(config)
    assert (caught.value.field, caught.value.value) == (field, value)
