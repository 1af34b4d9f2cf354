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

from megacpp_stp.stp import scale as scale_module
from megacpp_stp.stp import taps as taps_module
from megacpp_stp.stp.config import FINAL_NORM, StpConfig
from megacpp_stp.stp.layout import SequenceLayout
from megacpp_stp.stp.microbatch import Announcement
from megacpp_stp.stp.scale import row_factor
from megacpp_stp.stp.seam import GradScale
from megacpp_stp.stp.taps import StpTaps
from tests.parity._gloo import run_ranks
from tests.parity.cells import cell
from tests.parity.gradients import Rank, schedule_outcome
from tests.parity.model import BATCH, SEQUENCE
from tests.parity.table import gradient_errors, relative_errors, truth_of, whole_copies

FAR = 1e-2  # relative error of some gradient; the cells themselves stay below 3e-6
FAR_AFTER = 1e-3  # of some parameter after the steps; the cells themselves stay below 3e-6


def _factor(change):
    """Let the factor of the rows be changed."""
    return mock.patch.object(taps_module, "row_factor", lambda config, **keys: change(row_factor(config, **keys)))


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
    take, all_of_them = StpTaps.set_microbatch, torch.tensor(BATCH * SEQUENCE)
    with mock.patch.object(StpTaps, "set_microbatch", lambda taps, **_: take(taps, tokens=all_of_them)):
        yield


@contextmanager
def _tokens_of_one_rank():
    """Do not add the tokens of the other context-parallel ranks."""
    init = Announcement.__init__
    with mock.patch.object(
        Announcement, "__init__", lambda self, *, context_group=None, **wanted: init(self, **wanted)
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


@contextmanager
def _layers_counted_alone():
    """Divide by the number of tapped layers, the final norm left out."""

    def wrong(config, **keys):
        layers = tuple(tap for tap in config.taps if tap != FINAL_NORM)
        return row_factor(replace(config, taps=layers), **keys)

    with mock.patch.object(taps_module, "row_factor", wrong):
        yield


@contextmanager
def _ramp_ignored():
    """The whole weight once the gate is open."""
    with mock.patch.object(StpConfig, "weight_at", lambda config, iteration: config.weight):
        yield


@contextmanager
def _another_policy(**changes):
    """Draw and measure as another policy says."""
    draw, terms = taps_module.draw_spans, taps_module.span_terms
    with (
        mock.patch.object(taps_module, "draw_spans", lambda config, *a, **k: draw(replace(config, **changes), *a, **k)),
        mock.patch.object(
            taps_module, "span_terms", lambda config, *a, **k: terms(replace(config, **changes), *a, **k)
        ),
    ):
        yield


@contextmanager
def _documents_ignored():
    """Draw from whole sequences."""
    draw = taps_module.draw_spans
    with mock.patch.object(taps_module, "draw_spans", lambda *a, **k: draw(*a, **k | {"documents": None})):
        yield


@contextmanager
def _documents_of_the_first_microbatch():
    """Keep the documents that were said first."""
    take, first = StpTaps.set_microbatch, []

    def wrong(taps, *, tokens, documents):
        first.append(documents)
        take(taps, tokens=tokens, documents=first[0])

    with mock.patch.object(StpTaps, "set_microbatch", wrong):
        yield


@contextmanager
def _indexer_scale_dropped():
    """Take the configuration's slot without what the schedules would have called."""
    with mock.patch.object(scale_module, "_upstream_default", lambda transformer_config: None):
        yield


@contextmanager
def _indexer_scale_doubled():
    """Hand the indexer a scale of STP's."""
    default = scale_module._upstream_default

    def wrong(transformer_config):
        feed = default(transformer_config)
        return lambda value: feed(2 * value)

    with mock.patch.object(scale_module, "_upstream_default", wrong):
        yield


@contextmanager
def _scale_of_the_first_step():
    """Keep the first value that the schedule hands over."""
    first = []

    def keep(value):
        first.append(value.clone())
        return first[0]

    with _hook_value(keep):
        yield


@contextmanager
def _ramp_that_stays():
    """Keep the weight of the first step."""
    weight_at = StpConfig.weight_at
    with mock.patch.object(StpConfig, "weight_at", lambda config, iteration: weight_at(config, config.start_step)):
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
    "final norm not counted": (_layers_counted_alone, "final norm and layers, PP2"),
    "ramp ignored": (_ramp_ignored, "ramp over 3 steps, PP2"),
    "window ignored": (lambda: _another_policy(max_span=None), "window of 5, PP2"),
    "triple for chord": (lambda: _another_policy(objective="triple"), "chord, PP2"),
    "documents ignored": (_documents_ignored, "documents, PP2"),
    "documents of the first microbatch": (_documents_of_the_first_microbatch, "documents, PP2"),
    "documents of the microbatch of the layer": (_microbatch_of_the_layer, "documents, full recomputation, PP2"),
    "indexer's scale dropped": (_indexer_scale_dropped, "letters, PP2"),
    "indexer's scale doubled": (_indexer_scale_doubled, "letters, PP2"),
}
# Right in the first step and wrong in the later ones: seen in the parameters.
LATER = {
    "loss scale of the first step": (_scale_of_the_first_step, "loss scale 1024, 512, 2048, PP2"),
    "loss scale of the first step, skipped step": (
        _scale_of_the_first_step,
        "Megatron's loss scaler, a step skipped, PP2",
    ),
    "ramp that stays": (_ramp_that_stays, "ramp over 3 steps, PP2"),
}
QUICK = {
    "twice",
    "microbatches missing",
    "taps of the stage",
    "context size missing",
    "microbatch of the layer",
    "documents ignored",
    "indexer's scale dropped",
}


def mutated(chosen, name):
    """What one rank finds with the mutant in place."""
    mutant, _ = (MUTANTS | LATER)[name]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_the_comparison_of_later_steps_fails_with(name):
    chosen = cell(LATER[name][1])
    ranks, truth = run_ranks(mutated, chosen.world_size, chosen, name, layout=chosen.layout), truth_of(chosen)
    assert max(gradient_errors(ranks, truth).values()) <= chosen.tolerance
    errors = relative_errors(whole_copies(ranks, "parameters"), truth.parameters)
    assert max(errors.values()) > FAR_AFTER, max(errors.values())
