"""Each factor of the STP gradient, taken away or made wrong: the comparison with plain autograd sees every one.

A mutant changes the code in the processes of one cell, by patching; the cells pass without it in
`tests/parity/test_stp_gradient.py`.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from megacpp_stp.stp import taps as taps_module
from megacpp_stp.stp.layout import SequenceLayout
from megacpp_stp.stp.scale import row_factor
from megacpp_stp.stp.seam import GradScale
from megacpp_stp.stp.taps import StpTaps
from megacpp_stp.stp.tokens import TokenCount
from tests.parity._gloo import run_ranks
from tests.parity.cells import cell
from tests.parity.gradients import Rank, schedule_outcome
from tests.parity.model import BATCH, SEQUENCE
from tests.parity.table import gradient_errors, truth_of

FAR = 1e-2  # relative error of some gradient; the cells themselves stay below 3e-6


def _factor(change):
    """Let the factor of the rows be changed."""
    return mock.patch.object(
        taps_module, "row_factor", lambda config, *, tokens: change(row_factor(config, tokens=tokens))
    )


def _hook_value(change):
    """Let the value that the schedule hands over be changed."""
    take = GradScale.set
    return mock.patch.object(GradScale, "set", lambda scale, value: take(scale, change(value)))


@contextmanager
def _taps_of_the_stage():
    """Divide by the number of taps on this stage, as if each stage had all of them."""
    attach, tapped = StpTaps.attach, []
    with (
        mock.patch.object(StpTaps, "attach", lambda taps, stack: tapped.extend(attach(taps, stack))),
        _factor(lambda factor: factor * len(CELLS_TAPS) / len(tapped)),
    ):
        yield


CELLS_TAPS = cell("PP2, taps unevenly on stages").taps


@contextmanager
def _unshared_rows():
    """Sample on each rank's own rows, the others zero."""
    with mock.patch.object(
        SequenceLayout, "share", lambda layout, rows, mine: torch.where(mine.unsqueeze(-1), rows, 0)
    ):
        yield


@contextmanager
def _contiguous():
    """Take the context-parallel split for contiguous shards."""
    locate = SequenceLayout.locate

    def wrong(layout, position, *, length):
        shards = SequenceLayout(tensor_size=layout.context_size, tensor_rank=layout.context_rank)
        return locate(shards, position, length=length)

    with mock.patch.object(SequenceLayout, "locate", wrong):
        yield


@contextmanager
def _tokens_unmasked():
    """Count all tokens, masked ones too."""
    take = StpTaps.set_tokens
    with mock.patch.object(StpTaps, "set_tokens", lambda taps, count: take(taps, torch.tensor(BATCH * SEQUENCE))):
        yield


@contextmanager
def _tokens_of_one_rank():
    """Do not add the tokens of the other context-parallel ranks."""
    init = TokenCount.__init__
    with mock.patch.object(
        TokenCount, "__init__", lambda self, *, wanted, context_group=None: init(self, wanted=wanted)
    ):
        yield


@contextmanager
def _microbatch_of_the_layer():
    """Recompute with the microbatch that the schedule named last."""
    stage = taps_module._Stage
    with mock.patch.object(stage, "_place_in_backward", lambda self: self._taps.place(self._layer, stage=self)):
        yield


@contextmanager
def _one_draw_for_all_data_ranks():
    """Let each data rank draw the triples of the first."""
    init = Rank.__init__

    def wrong(rank, chosen, stp):
        init(rank, chosen, stp)
        rank.taps._data_rank = 0

    with mock.patch.object(Rank, "__init__", wrong):
        yield


@contextmanager
def _scale_fixed_at_the_start():
    """Keep the first value that the schedule hands over, of one microbatch less."""
    with _hook_value(lambda value: torch.full_like(value, 1 / 3)):
        yield


MUTANTS = {
    "twice": (lambda: _factor(lambda factor: 2 * factor), "PP2"),
    "half, beside the experts' losses": (lambda: _factor(lambda factor: factor / 2), "PP2, experts' losses"),
    "microbatches missing": (lambda: _hook_value(lambda value: value * 4), "PP2"),
    "microbatches of another step": (_scale_fixed_at_the_start, "PP2"),
    "loss scale missing": (lambda: _hook_value(lambda value: value / 1024), "PP2, loss scale 1024"),
    "taps of the stage": (_taps_of_the_stage, "PP2, taps unevenly on stages"),
    "context size missing": (lambda: _hook_value(lambda value: value / 2), "CP2"),
    "context size twice": (lambda: _hook_value(lambda value: value * 2), "CP2"),
    "context split taken for contiguous": (_contiguous, "CP2"),
    "context rows not shared": (_unshared_rows, "CP2"),
    "sequence rows not shared": (_unshared_rows, "TP2 + SP"),
    "divided by tensor ranks": (lambda: _factor(lambda factor: factor / 2), "TP2 + SP"),
    "data rank missing in the draw": (_one_draw_for_all_data_ranks, "DP2"),
    "tokens unmasked": (_tokens_unmasked, "per token, DP2"),
    "tokens of one context rank": (_tokens_of_one_rank, "per token, CP2"),
    "microbatch of the layer": (_microbatch_of_the_layer, "PP2, full recomputation, uniform"),
}
QUICK = {"twice", "microbatches missing", "taps of the stage", "context size missing", "microbatch of the layer"}


def mutated(chosen, name):
    """One rank's first gradients with the mutant in place."""
    mutant, _ = MUTANTS[name]
    with ExitStack() as stack:
        stack.enter_context(mutant())
        return schedule_outcome(chosen)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MUTANTS]
)
def test_the_comparison_fails_with(name):
    chosen = cell(MUTANTS[name][1])
    ranks = run_ranks(
        mutated,
        chosen.world_size,
        replace(chosen, microbatches=chosen.microbatches[:1]),
        name,
        layout=chosen.layout,
    )
    assert max(gradient_errors(ranks, truth_of(chosen)).values()) > FAR
