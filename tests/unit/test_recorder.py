"""The recorder's end of an iteration: a tap that nothing feeds ends the run, and what the record says of STP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.taps import StpTaps
from megacpp_stp.training import recorder as recorder_module
from megacpp_stp.training.recorder import Recorder

CPU = torch.device("cpu")


class Optimizer:
    """What megatron.training hangs its scale function on."""

    param_groups = ({"lr": 0.25},)

    def scale_loss(self, loss):
        return loss

    def get_loss_scale(self):
        return torch.ones(1)

    def step(self):
        return True, 1.5, None


class Run:
    """One rank's recorder, with taps after layers 2, 5 and 7 and the gate open from the second iteration on."""

    def __init__(self):
        self.done, self.emitted, self.evaluated, self.finalized, self.reports = 0, [], [], 0, []
        config = StpConfig(weight=0.5, n_spans=4, start_step=1, taps=(2, 5, 7), seed=0)
        self.taps = StpTaps(config, iteration=lambda: self.done, data_rank=0)
        self.recorder = Recorder(
            device=CPU,
            iteration=lambda: self.done,
            tokens_per_iteration=8,
            bits_per_byte=lambda split, nats: {"train": 2, "valid": 3}[split] * nats,
            peak_memory=lambda: 123,
            emit=self.emitted.append,
            emit_validation=self.evaluated.append,
        )
        self.recorder.observe_stp(self.taps)
        self.optimizer = Optimizer()
        self.config = SimpleNamespace(
            finalize_model_grads_func=self._finalize, grad_scale_func=self.optimizer.scale_loss
        )
        self.recorder.install(self.config)

    def _finalize(self):
        self.finalized += 1

    def iterate(self, **loss_by_tap):
        """One iteration in which the taps named, as ``layer_2=1.0``, were fed once."""
        self.recorder.begin_forward(training=True)
        for name, loss in loss_by_tap.items():
            layer = int(name.removeprefix("layer_"))
            self.taps.meter.add(layer, loss=torch.tensor(loss), valid=torch.tensor(3.0), triples=4)
        self.reports = [{"lm loss": torch.tensor([6.0, 4.0])}, {"lm loss": torch.tensor([2.0, 4.0])}]
        for report in self.reports:
            self.recorder.add_loss(report, training=True)
        self.config.finalize_model_grads_func()
        self.optimizer.step()
        self.done += 1


@pytest.fixture
def run(monkeypatch):
    """This process is the whole world."""
    monkeypatch.setattr(recorder_module, "data_then_pipeline", list)
    monkeypatch.setattr(recorder_module.dist, "all_reduce", lambda *args, **kwargs: None)
    return Run()


@pytest.mark.parametrize(
    ("fed", "dead"),
    [({}, 2), ({"layer_2": 1.0}, 5), ({"layer_2": 1.0, "layer_5": 1.0}, 7), ({"layer_2": 0.0, "layer_7": 0.0}, 5)],
    ids=["all dead", "two dead", "last dead", "a loss of zero is not dead"],
)
def test_a_tap_that_nothing_fed_ends_the_first_iteration_and_is_named(run, fed, dead):
    with pytest.raises(UserError, match=f"no rank fed the tap after layer {dead} in the first iteration") as caught:
        run.iterate(**fed)
    assert (caught.value.field, caught.value.value) == ("stp.taps", ["2", "5", "7"])
    assert run.finalized == 1  # the gradients' own collectives ran: no other rank is left waiting in them
    assert run.emitted == []


def test_taps_that_were_fed_once_are_not_checked_again(run):
    """Later a rank may skip a microbatch; the wiring was proven in the first iteration."""
    run.iterate(layer_2=1.0, layer_5=0.0, layer_7=0.5)
    run.iterate(layer_2=1.0)
    run.iterate()
    assert [record["iteration"] for record in run.emitted] == [1, 2, 3]
    assert run.emitted[1]["stp_loss_by_tap"] == {"2": 1.0, "5": None, "7": None}
    assert run.emitted[2]["stp_loss"] is None
    assert "stp loss" not in run.reports[0]


def test_a_failed_check_is_made_again(run):
    for _ in range(2):
        with pytest.raises(UserError, match="layer 5"):
            run.iterate(layer_2=1.0, layer_7=1.0)


def test_a_record_says_what_stp_measured_and_whether_it_was_active(run):
    """lm loss: 8 nats over 8 tokens. STP: the mean over taps, weighted only once the gate is open."""
    run.iterate(layer_2=1.0, layer_5=0.0, layer_7=0.5)
    assert [report["stp loss"].tolist() for report in run.reports] == [[0.5], [0.5]]
    run.iterate(layer_2=1.0, layer_5=0.0, layer_7=0.5)
    before, after = run.emitted
    assert (before["lm_loss"], before["bits_per_byte"], before["loss_tokens"]) == (1.0, 2.0, 8)
    for record, active, weighted in ((before, False, 0.0), (after, True, 0.25)):
        assert (record["stp_active"], record["stp_loss"], record["stp_weighted"]) == (active, 0.5, weighted)
        assert record["stp_loss_by_tap"] == {"2": 1.0, "5": 0.0, "7": 0.5}
        assert record["stp_valid_fraction"] == 0.75
        assert (record["grad_norm"], record["learning_rate"], record["skipped"]) == (1.5, 0.25, False)


def test_an_evaluation_is_measured_by_the_bytes_of_its_own_split(run):
    run.recorder.begin_forward(training=False)
    run.recorder.add_loss({"lm loss": torch.tensor([6.0, 4.0])}, training=False)
    run.recorder.end_evaluation()
    assert run.evaluated == [{"iteration": 0, "lm_loss": 1.5, "bits_per_byte": 4.5}]


def test_a_step_that_the_optimizer_refused_is_skipped_and_has_no_norm(run, monkeypatch):
    monkeypatch.setattr(Optimizer, "step", lambda self: (False, None, None))
    run.iterate(layer_2=1.0, layer_5=0.0, layer_7=0.5)
    assert (run.emitted[0]["skipped"], run.emitted[0]["grad_norm"]) == (True, None)


def test_without_stp_the_record_has_no_word_of_it(run):
    run.recorder._taps = None
    run.iterate()
    (record,) = run.emitted
    assert not [name for name in record if name.startswith("stp")]
    assert all("stp loss" not in report for report in run.reports)


@pytest.mark.parametrize("within_documents", [False, True])
def test_stp_hears_of_the_microbatches_of_training_only(within_documents):
    heard = []
    recorder = Recorder.__new__(Recorder)
    recorder._taps = SimpleNamespace(
        set_microbatch=lambda **facts: heard.append(facts),
        config=SimpleNamespace(within_documents=within_documents),
    )
    documents = torch.zeros(1, 3)
    for training in (True, False):
        recorder.announce(tokens=torch.tensor(7.0), documents=lambda: documents, training=training)
    (facts,) = heard
    assert float(facts["tokens"]) == 7.0
    assert facts["documents"] is (documents if within_documents else None)
    recorder._taps = None
    recorder.announce(tokens=torch.tensor(7.0), documents=lambda: documents, training=True)
