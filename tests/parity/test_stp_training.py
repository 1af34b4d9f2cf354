"""STP that adds nothing changes nothing: parameters after optimizer steps, and random streams, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megacpp_stp.stp.config import FINAL_NORM
from tests.parity._gloo import run_ranks
from tests.parity.cell import ITERATION, STEPS
from tests.parity.cells import cell
from tests.parity.gradients import streams_after, trained

CELL = replace(cell("PP2"), taps=(2, 7), microbatches=(2,) * STEPS)
STP = replace(CELL.stp, weight=0.5)


WAYS = {
    "without": None,
    "weight 0": replace(STP, weight=0.0, start_step=0),
    "gate not reached": replace(STP, start_step=ITERATION + STEPS),
    "gate not reached, with all else": replace(
        STP,
        start_step=ITERATION + STEPS,
        taps=(*STP.taps, FINAL_NORM),
        objective="chord",
        within_documents=True,
        ramp_steps=2,
    ),
    "last step": replace(STP, start_step=ITERATION + STEPS - 1),
}


@pytest.fixture(scope="module")
def parameters():
    """Of both stages, after all steps, by way."""
    first, second = run_ranks(trained, 2, CELL, list(WAYS.values()), layout=CELL.layout)
    return {way: one | other for way, one, other in zip(WAYS, first, second, strict=True)}


@pytest.mark.parametrize("way", ["weight 0", "gate not reached", "gate not reached, with all else"])
def test_parameters_are_bit_identical_to_a_run_without_stp(parameters, way):
    without, found = parameters["without"], parameters[way]
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in without)


def test_stp_with_weight_changes_what_lies_below_a_tap(parameters):
    without, found = parameters["without"], parameters["last step"]
    changed = {name for name in without if not torch.equal(found[name], without[name])}
    assert {name for name in without if name.startswith(("layer 1:", "layer 2:", "layer 7:"))} <= changed


def test_taps_leave_every_random_stream_where_a_run_without_them_leaves_it():
    """Torch's default generator and Megatron's tracked streams on both stages, the gate open and closed.

    A draw in a tap would change the dropout that follows it, so that a run could not be compared with one without.
    """
    dropout = replace(CELL, settings={"attention_dropout": 0.1})  # the runs draw from the tracked streams themselves
    closed = replace(STP, start_step=ITERATION + 1)
    for rank in run_ranks(streams_after, 2, dropout, [None, closed, STP], layout=CELL.layout):
        start, without, *with_taps = rank
        assert without.keys() >= {"default", "model-parallel-rng", "expert-parallel-rng"}
        assert not torch.equal(without["model-parallel-rng"], start["model-parallel-rng"])  # dropout drew from it
        for found in with_taps:
            assert found.keys() == without.keys()
            assert [name for name in without if not torch.equal(found[name], without[name])] == []
