"""What one iteration's STP is called, in metrics and on the boards."""

import pytest

from megacpp_stp.stp.config import FINAL_NORM, StpConfig
from megacpp_stp.stp.diagnosis import TapDiagnosis
from megacpp_stp.stp.meter import StpReading
from megacpp_stp.stp.record import diagnosis_record, scalars, stp_record
from megacpp_stp.training import writers

CONFIG = StpConfig(
    weight=0.5,
    n_spans=2,
    start_step=4,
    ramp_steps=2,
    taps=(3, 8, 12, FINAL_NORM),
    families=("M", "R", "M", "final-norm"),
    seed=0,
)
READING = StpReading(
    loss_by_tap={3: 1.0, 8: 0.25, 12: 0.5, FINAL_NORM: 1.5},
    readings_by_tap=dict.fromkeys(CONFIG.taps, 2),
    valid_by_tap={3: 1.0, 8: 0.5, 12: 1.0, FINAL_NORM: 1.0},
    valid_fraction=0.875,
)


@pytest.mark.parametrize(("iteration", "weight", "active"), [(3, 0, False), (4, 0.25, True), (5, 0.5, True)])
def test_a_record_has_loss_weight_and_straightness(iteration, weight, active):
    record = stp_record(CONFIG, READING, iteration)
    assert record["stp_loss"] == 0.8125
    assert (record["stp_weight"], record["stp_active"]) == (weight, active)
    assert record["stp_weighted"] == weight * 0.8125
    assert record["stp_loss_by_tap"] == {"3": 1.0, "8": 0.25, "12": 0.5, "final-norm": 1.5}
    assert record["stp_straightness_by_tap"] == {"3": 0.0, "8": 0.75, "12": 0.5, "final-norm": -0.5}
    assert record["stp_straightness_by_family"] == {"M": 0.25, "R": 0.75, "final-norm": -0.5}
    assert (record["stp_valid_fraction"], record["stp_valid_fraction_by_tap"]["8"]) == (0.875, 0.5)


def test_without_families_nothing_is_said_of_them():
    plain = StpConfig(weight=0.5, n_spans=2, start_step=4, taps=CONFIG.taps, seed=0)
    assert "stp_straightness_by_family" not in stp_record(plain, READING, 0)


def test_a_board_gets_every_number_under_a_name_of_its_own():
    record = {"lm_loss": 3.0, "iteration": 10} | stp_record(CONFIG, READING, 5)
    record |= diagnosis_record({3: TapDiagnosis(7.5, None, 0.01)})
    names = scalars(record)
    assert names["stp loss"] == 0.8125
    assert names["stp loss/8"] == 0.25
    assert names["stp straightness/final-norm"] == -0.5
    assert names["stp straightness by family/M"] == 0.25
    assert names["stp effective rank/3"] == 7.5
    assert names["stp active"] == 1.0
    assert not any("clock" in name or "lm" in name for name in names)


class Board:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, iteration):
        self.seen.append((name, value, iteration))

    def log(self, values, iteration):
        self.seen.append((values, iteration))


def test_boards_are_written_at_megatrons_interval_and_never_twice(monkeypatch):
    from megatron.training import global_vars

    tensorboard, wandb = Board(), Board()
    monkeypatch.setattr(global_vars, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(global_vars, "get_wandb_writer", lambda: wandb)
    record = stp_record(CONFIG, READING, 5)
    writers.write_scalars({"iteration": 6} | record, interval=4)
    assert tensorboard.seen == wandb.seen == []
    writers.write_scalars({"iteration": 8} | record, interval=4)
    assert ("stp loss/3", 1.0, 8) in tensorboard.seen
    assert "stp loss" not in [name for name, _, _ in tensorboard.seen]  # Megatron writes what is in its console line
    assert wandb.seen == [({name: value for name, value, _ in tensorboard.seen}, 8)]
    monkeypatch.setattr(global_vars, "get_tensorboard_writer", lambda: None)
    writers.write_scalars({"iteration": 8} | record, interval=4)
