"""Every parameter's gradient under Megatron's schedules equals plain autograd of ``lm_loss + weight * stp_loss``."""

import pytest
import torch

from megacpp_stp.stp.config import StpConfig
from tests.parity._gloo import Layout, run_ranks
from tests.parity.gradients import plain_gradients, schedule_gradients

MICROBATCHES = 4
# Heavy, so that a wrong factor cannot hide beside the language-model loss; taps on first, middle and last stages.
CONFIG = StpConfig(weight=2.0, n_spans=3, start_step=3, taps=(2, 5, 7, 10), seed=11)


# Both losses of the experts, heavy for the same reason.
EXPERT_LOSSES = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 2.0, "moe_z_loss_coeff": 0.1}


def relative_errors(found, truth):
    assert found.keys() == truth.keys()
    return {name: ((found[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth}


def worst(errors):
    return sorted(errors.items(), key=lambda item: -item[1])[:5]


def merged(ranks):
    gradients = {}
    for rank in ranks:
        gradients.update(rank)
    return gradients


@pytest.fixture(scope="module")
def truth():
    return run_ranks(plain_gradients, 1, CONFIG, MICROBATCHES, 1)[0]


@pytest.fixture(scope="module")
def truth_without_stp():
    return run_ranks(plain_gradients, 1, None, MICROBATCHES, 1)[0]


@pytest.fixture(scope="module")
def one_stage():
    return run_ranks(schedule_gradients, 1, CONFIG, MICROBATCHES, 1, None)[0]


def test_one_stage_equals_plain_autograd(one_stage, truth):
    errors = relative_errors(one_stage, truth)
    assert max(errors.values()) <= 1e-5, worst(errors)


@pytest.mark.parametrize("virtual", [None, 2], ids=["PP2", "PP2xVPP2"])
def test_pipeline_stages_equal_plain_autograd_and_one_stage_bit_for_bit(one_stage, truth, virtual):
    layout = Layout(pipeline=2, virtual=virtual)
    found = merged(run_ranks(schedule_gradients, 2, CONFIG, MICROBATCHES, 2, virtual, layout=layout))
    errors = relative_errors(found, truth)
    assert max(errors.values()) <= 1e-5, worst(errors)
    assert all(torch.equal(found[name], one_stage[name]) for name in one_stage)


@pytest.fixture(scope="module")
def truth_of_two_data_ranks():
    return run_ranks(plain_gradients, 1, CONFIG, MICROBATCHES // 2, 2)[0]


def test_data_parallel_gradients_equal_plain_autograd(truth_of_two_data_ranks):
    ranks = run_ranks(schedule_gradients, 2, CONFIG, MICROBATCHES // 2, 1, None)
    for rank in ranks:
        errors = relative_errors(rank, truth_of_two_data_ranks)
        assert max(errors.values()) <= 1e-5, worst(errors)


def test_pipeline_times_data_parallel_gradients_equal_plain_autograd(truth_of_two_data_ranks):
    """Four ranks: a data rank's triples must be its own on both of its stages."""
    ranks = run_ranks(schedule_gradients, 4, CONFIG, MICROBATCHES // 2, 2, None, layout=Layout(pipeline=2))
    # Megatron numbers data ranks first: global ranks 0 and 2 are the stages of data rank 0.
    for data_rank in (0, 1):
        errors = relative_errors(merged(ranks[data_rank::2]), truth_of_two_data_ranks)
        assert max(errors.values()) <= 1e-5, worst(errors)


def test_a_loss_scale_leaves_the_unscaled_gradients_alone(truth):
    layout = Layout(pipeline=2)
    found = merged(run_ranks(schedule_gradients, 2, CONFIG, MICROBATCHES, 2, None, None, 8.0, layout=layout))
    errors = relative_errors(found, truth)
    assert max(errors.values()) <= 1e-5, worst(errors)


def test_stp_beside_the_experts_losses_equals_plain_autograd(truth):
    """Load balancing and z-loss have an autograd function and a scale of their own; neither disturbs the other."""
    truth_of_all = run_ranks(plain_gradients, 1, CONFIG, MICROBATCHES, 1, EXPERT_LOSSES)[0]
    layout = Layout(pipeline=2)
    found = merged(run_ranks(schedule_gradients, 2, CONFIG, MICROBATCHES, 2, None, EXPERT_LOSSES, layout=layout))
    errors = relative_errors(found, truth_of_all)
    assert max(errors.values()) <= 1e-5, worst(errors)
    without = relative_errors(truth, truth_of_all)
    routers = [name for name in truth if "router" in name]
    assert len(routers) == 4
    assert all(without[name] > 1e-2 for name in routers)


def test_the_comparison_would_see_a_wrong_factor(truth, truth_without_stp):
    """STP is a large part of the gradients compared above: without it, or at half its weight, they differ widely."""
    errors = relative_errors(truth_without_stp, truth)
    reached = [name for name, error in errors.items() if error > 1e-2]
    # Everything below the last tap; the last layers and the head see no STP at all.
    assert len(reached) > 0.75 * len(errors)
    assert all(error > 1e-2 for name, error in errors.items() if name.startswith(("layer 1:", "layer 2:")))


def test_before_the_gate_gradients_are_bit_identical_to_a_run_without_stp():
    closed = StpConfig(weight=2.0, n_spans=3, start_step=4, taps=CONFIG.taps, seed=11)
    layout = Layout(pipeline=2)
    with_taps, without = (
        merged(run_ranks(schedule_gradients, 2, config, MICROBATCHES, 2, None, layout=layout))
        for config in (closed, None)
    )
    assert with_taps.keys() == without.keys()
    assert all(torch.equal(with_taps[name], without[name]) for name in without)
