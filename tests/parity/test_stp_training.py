"""STP that adds nothing changes nothing: parameters after five optimizer steps, and random streams, bit for bit."""

import pytest
import torch

from megacpp_stp.stp.config import StpConfig
from tests.parity._gloo import Layout, run_ranks
from tests.parity.gradients import ITERATION, streams_after, trained_parameters

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


def test_taps_leave_every_random_stream_where_a_run_without_them_leaves_it():
    """Torch's default generator and Megatron's tracked streams on both stages, the gate open and closed.

    A draw in a tap would change the dropout that follows it, so that a run could not be compared with one without.
    """
    open_gate, closed = (
        StpConfig(weight=0.5, n_spans=3, start_step=step, taps=(2, 7), seed=11) for step in (ITERATION, ITERATION + 1)
    )
    for rank in run_ranks(streams_after, 2, [None, closed, open_gate], 2, 2, layout=Layout(pipeline=2)):
        start, without, *with_taps = rank
        assert without.keys() >= {"default", "model-parallel-rng", "expert-parallel-rng"}
        assert not torch.equal(without["model-parallel-rng"], start["model-parallel-rng"])  # dropout drew from it
        for found in with_taps:
            assert found.keys() == without.keys()
            assert [name for name in without if not torch.equal(found[name], without[name])] == []
