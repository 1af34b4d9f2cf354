"""STP that adds nothing changes nothing: parameters after five optimizer steps, bit for bit."""

import pytest
import torch

from megacpp_stp.stp.config import StpConfig
from tests.parity._gloo import Layout, run_ranks
from tests.parity.gradients import trained_parameters

STEPS = 5


def trained(weight, start_step):
    config = None
    if weight is not None:
        config = StpConfig(weight=weight, n_spans=3, start_step=start_step, taps=(2, 7), seed=11)
    ranks = run_ranks(trained_parameters, 2, config, 2, 2, STEPS, layout=Layout(pipeline=2))
    return {name: value for rank in ranks for name, value in rank.items()}


@pytest.fixture(scope="module")
def without():
    return trained(None, 0)


@pytest.mark.parametrize(("weight", "start_step"), [(0.0, 0), (0.5, STEPS)], ids=["weight 0", "gate not reached"])
def test_parameters_are_bit_identical_to_a_run_without_stp(without, weight, start_step):
    found = trained(weight, start_step)
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in without)


def test_stp_with_weight_changes_what_lies_below_a_tap(without):
    found = trained(0.5, STEPS - 1)
    changed = {name for name in without if not torch.equal(found[name], without[name])}
    assert {name for name in without if name.startswith(("layer 1:", "layer 2:", "layer 7:"))} <= changed
