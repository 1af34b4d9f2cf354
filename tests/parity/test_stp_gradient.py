"""Every parameter's gradient, and the parameters after three steps, equal plain autograd of ``lm + weight * STP``.

The cells are in `tests/parity/cells.py`; ``python -m tests.parity.table`` prints the errors that they reach.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity._gloo import run_ranks
from tests.parity.cell import ALL_KINDS, EXPERT_LOSSES, ITERATION
from tests.parity.cells import CELLS, cell
from tests.parity.gradients import gradients_with
from tests.parity.plain import plain_outcome
from tests.parity.table import outcomes_of, relative_errors, row_of, truth_of, whole_copies


@pytest.mark.parametrize(
    "name", [pytest.param(chosen.name, marks=[] if chosen.quick else pytest.mark.slow) for chosen in CELLS]
)
def test_equals_plain_autograd(name):
    row = row_of(cell(name))
    assert row.gradient <= cell(name).tolerance, row
    assert row.parameter is None or row.parameter <= cell(name).after, row
    assert row.loss <= 1e-6, row


# Not recomputation: upstream adds up an expert layer's gradients in another order there, without STP too.
ONE_STAGE = {
    "PP2": "PP1",
    "PP4": "PP1",
    "PP2 x VPP2": "PP1",
    "PP2, loss scale 1024": "PP1",
    "PP2, 1 microbatch": "PP1, 1 microbatch",
    "per token, PP2": "per token, PP1",
    "per token, PP2 x VPP2": "per token, PP1",
    "CP2 x PP2": "CP2",
    "per token, CP2 x PP2": "per token, CP2",
    "PP2 x TP2 + SP": "TP2 + SP",
    "final norm and layers, PP2": "final norm and layers, PP1",
    "documents, PP2 x VPP2": "documents, PP2",
    "ramp over 3 steps, PP2": "ramp over 3 steps, PP1",
    "loss scale 1024, 512, 2048, PP2": "PP1",
    "Megatron's loss scaler, a step skipped, PP2": "Megatron's loss scaler, a step skipped, PP1",
    "letters, PP2": "letters, PP1",
    "letters, PP4": "letters, PP1",
    "letters, PP2 x VPP2": "letters, PP1",
    "letters, loss scale 1024, 512, 2048, PP2": "letters, PP1",
    "letters, PP2 x TP2 + SP": "letters, TP2 + SP",
}


@pytest.mark.parametrize(
    ("name", "one_stage"),
    [
        pytest.param(name, one, marks=[] if cell(name).quick and cell(one).quick else pytest.mark.slow)
        for name, one in ONE_STAGE.items()
    ],
)
@pytest.mark.parametrize("what", ["gradients", "parameters"])
def test_stages_are_bit_identical_to_one_stage(name, one_stage, what):
    truth = dict(whole_copies(outcomes_of(cell(one_stage)), what))
    found = whole_copies(outcomes_of(cell(name)), what)
    assert {parameter for parameter, _ in found} == truth.keys()
    assert [parameter for parameter, value in found if not torch.equal(value, truth[parameter])] == []


def test_the_comparison_would_see_a_missing_loss():
    """STP is a large part of the gradients compared above, and nearly everywhere."""
    truth = truth_of(cell("PP1"))
    without = run_ranks(plain_without_stp, 1, cell("PP1").plain)[0]
    errors = relative_errors(without.gradients.items(), truth.gradients)
    reached = [name for name, error in errors.items() if error > 1e-2]
    # Everything below the last tap; the last layers and the head see no STP at all.
    assert len(reached) > 0.75 * len(errors)
    assert all(error > 1e-2 for name, error in errors.items() if name.startswith(("layer 1:", "layer 2:")))


def plain_without_stp(chosen):
    return plain_outcome(replace(chosen, microbatches=chosen.microbatches[:1]), with_stp=False)


@pytest.mark.slow
def test_the_comparison_would_see_the_indexers_loss_missing():
    """Its gradient is a large part of the indexer's, and all of it."""
    chosen = cell("letters, PP2")
    weak = replace(chosen, model={"dsa_indexer_loss_coeff": 1.0}, microbatches=chosen.microbatches[:1])
    truth, half = truth_of(chosen), run_ranks(plain_outcome, 1, weak.plain)[0]
    errors = relative_errors(half.gradients.items(), truth.gradients)
    indexers = {name for name in errors if ".indexer." in name}
    assert len(indexers) == 10
    assert all(errors[name] == pytest.approx(0.5, abs=1e-4) for name in indexers)
    assert all(error < 1e-6 for name, error in errors.items() if name not in indexers)


@pytest.mark.slow
def test_the_comparison_would_see_the_experts_losses_missing():
    chosen = cell("PP2, experts' losses")
    assert chosen.model == EXPERT_LOSSES
    silent = replace(chosen, model={"moe_router_topk": EXPERT_LOSSES["moe_router_topk"]})
    with_losses, without = truth_of(chosen), run_ranks(plain_outcome, 1, silent.plain)[0]
    errors = relative_errors(without.gradients.items(), with_losses.gradients)
    routers = [name for name in errors if "router" in name]
    assert len(routers) == "".join(ALL_KINDS).count("E")
    assert all(errors[name] > 1e-2 for name in routers)


@pytest.mark.parametrize(
    "name",
    [
        "PP2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "CP2 x TP2 + SP",
                "letters, PP2",
                "letters, documents, final norm, PP2",
                "ramp over 3 steps, PP2",
                "chord, documents, final norm, PP2",
            )
        ),
    ],
)
def test_before_the_gate_gradients_are_bit_identical_to_a_run_without_stp(name):
    chosen = cell(name)
    closed = replace(chosen.stp, start_step=ITERATION + 1)
    for rank in run_ranks(gradients_with, chosen.world_size, chosen, [closed, None], layout=chosen.layout):
        with_taps, without = rank
        assert with_taps.keys() == without.keys()
        assert [parameter for parameter in without if not torch.equal(with_taps[parameter], without[parameter])] == []
