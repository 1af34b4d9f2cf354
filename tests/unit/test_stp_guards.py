"""What STP refuses, and that it feeds the auxiliary losses that were on Megatron's scale hook before it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.install import install_stp
from megacpp_stp.stp.layout import SequenceLayout
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


def test_a_megatron_without_the_hook_is_refused():
    older = make_dataclass("OlderConfig", [("calculate_per_token_loss", bool, False), ("num_layers", int, 1)])()
    with pytest.raises(UserError, match="no hook for auxiliary loss scales"):
        install_scale_hook(older, GradScale())
    assert not hasattr(older, HOOK)


# --- attaching the taps -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def forward(self, hidden, packed_seq_params=None):
        return hidden * 1


class Stack(torch.nn.Module):
    """A stage with layers 3 and 4."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
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


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_is_fine(config, granularity):
    config.recompute_granularity = granularity
    assert attach(config)[1] == (4,)


@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_full_recomputation_by_transformer_engine_is_refused(config, precision):
    config.recompute_granularity = "full"
    setattr(config, precision, "e4m3")
    with pytest.raises(UserError, match="Transformer Engine") as caught:
        attach(config)
    assert (caught.value.field, caught.value.value) == ("--recompute-granularity", "full")


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
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


# --- installing -------------------------------------------------------------------------------------


class Group:
    """A process group of which only size and rank are asked for."""

    def __init__(self, size=1, rank=0):
        self.size, self.rank = (lambda: size), (lambda: rank)


def install(config, *, tensor=1, context=1):
    chunk = torch.nn.Module()
    chunk.config, chunk.decoder, chunk.mtp = config, Stack(config), Stack(config)
    chunk.pg_collection = SimpleNamespace(tp=Group(tensor), cp=Group(context), tp_cp=Group(tensor * context))
    settings = StpConfig(weight=1.0, n_spans=1, start_step=0, taps=(3,), seed=0)
    return chunk, install_stp([chunk], settings, iteration=lambda: 0, data_rank=0)


def test_layers_of_multi_token_prediction_are_not_tapped(config):
    """They count from 1 again, so that their numbers are those of layers of the decoder."""
    chunk, _ = install(config)
    assert [len(layer._forward_hooks) for layer in chunk.decoder.layers] == [1, 0]
    assert [len(layer._forward_hooks) for layer in chunk.mtp.layers] == [0, 0]


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("hybrid_context_parallel", True, "--hybrid-context-parallel"),
        ("gtp_weight_remat_size", 2, "--gtp-weight-remat-size"),
    ],
)
def test_splits_whose_gradient_is_not_proven_are_refused_and_the_hook_left_alone(config, setting, value, field):
    setattr(config, setting, value)
    with pytest.raises(UserError) as caught:
        install(config)
    assert caught.value.field == field
    assert getattr(config, HOOK) is None


@pytest.mark.parametrize("context", [1, 2])
def test_packed_sequences_are_refused_under_context_parallelism_alone(config, context):
    """Their split may go document by document."""
    chunk, taps = install(config, context=context)
    layer = chunk.decoder.layers[0]
    layer.current_microbatch = 0
    taps._layout = SequenceLayout(context_size=context)
    hidden = torch.randn(8, 1, 4, requires_grad=True)
    with pytest.raises(UserError, match="packed") if context > 1 else nullcontext():
        layer(hidden, packed_seq_params=object())


@pytest.mark.parametrize("context", [1, 2])
def test_per_token_loss_needs_the_tokens_summed_over_the_context_ranks(config, context, monkeypatch):
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: summed.append(group))
    config.calculate_per_token_loss = True
    chunk, taps = install(config, context=context)
    layer = chunk.decoder.layers[0]
    layer.current_microbatch = 0
    hidden = torch.randn(8, 1, 4, requires_grad=True)
    with pytest.raises(UserError, match="StpTaps.set_microbatch"):
        layer(hidden)
    assert summed == []
    taps.set_microbatch(tokens=torch.tensor(5))
    assert summed == [chunk.pg_collection.cp] * (context - 1)
    layer(hidden)
    assert summed[context - 1 :] == [chunk.pg_collection.cp] * (context - 1)  # the rows


@pytest.mark.parametrize(
    ("tensor", "sequence", "context", "expected"),
    [(2, False, 1, None), (2, True, 1, "tp"), (1, False, 2, "cp"), (2, False, 2, "cp"), (2, True, 2, "tp_cp")],
)
def test_rows_go_to_the_ranks_that_share_a_sequence(config, tensor, sequence, context, expected):
    config.sequence_parallel = sequence
    chunk, taps = install(config, tensor=tensor, context=context)
    assert taps._layout.group is (expected and getattr(chunk.pg_collection, expected))
    assert taps._layout.whole(1) == (tensor if sequence else 1) * context
    assert taps.diagnosis._copies == context
    assert taps.diagnosis._shard_group is (chunk.pg_collection.tp if sequence else None)
