"""A run with everything that STP's keys can ask for: places by name, documents, a window, a ramp, a diagnosis."""

import json

import pytest

from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.training.writers import OF_THE_RUN
from tests.e2e.test_plugin import scalars
from tests.unit.test_runs_schema import require_run_fits

KEYS = (
    "stp.taps=[{family: A, last: 1}, final, final-norm]",
    "stp.within_documents=true",
    "stp.max_span=20",
    "stp.start_step=2",
    "stp.ramp_steps=3",
    "stp.diagnose_every=2",
    "training.fused_cross_entropy=torch",
    "model.families.A.sparse.kernel=chunked",
)
NAMES = ["9", "12", "final-norm"]


@pytest.fixture(scope="module")
def full_run(cli, short_run, tmp_path_factory):
    base = tmp_path_factory.mktemp("stp")
    overrides = [token for key in (*KEYS, f"megatron.tensorboard-dir={base / 'board'}") for token in ("--set", key)]
    done = cli(*short_run, *overrides, "--run-dir", str(base / "run"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return base / "run", read_metrics(base / "run" / "metrics.jsonl"), scalars(base / "board")


def test_the_weight_rises_after_the_gate(full_run):
    _, records, _ = full_run
    weights = [0, 0, 0.02 / 3, 0.04 / 3, 0.02, 0.02]
    assert [record["stp_weight"] for record in records] == pytest.approx(weights)
    for record in records:
        assert record["stp_weighted"] == record["stp_weight"] * record["stp_loss"]


def test_every_tap_is_measured_by_its_name_and_family(full_run):
    directory, records, _ = full_run
    for record in records:
        assert list(record["stp_loss_by_tap"]) == sorted(NAMES)  # as JSON is written
        straight = record["stp_straightness_by_tap"]
        assert straight == {name: 1 - loss for name, loss in record["stp_loss_by_tap"].items()}
        by_family = {"A": straight["9"], "R": straight["12"], "final-norm": straight["final-norm"]}
        assert record["stp_straightness_by_family"] == by_family
        assert record["stp_valid_fraction"] > 0.9
    receipt = json.loads((directory / "receipt.json").read_text())
    assert receipt["collected"]["taps"] == [9, 12, "final-norm"]
    assert receipt["windows"] == {"dormant": [1, 2], "warming": [3, 4], "active": [5, 6]}
    assert receipt["stp_iterations"] == {"dormant": 2, "warming": 2, "active": 2, "without_a_span": 0}


def test_the_loss_was_computed_without_logits_and_is_the_same(full_run, run):
    directory, records, _ = full_run
    receipt = json.loads((directory / "receipt.json").read_text())
    assert receipt["fused_cross_entropy"] == {"backend": "torch", "losses_in_first_iteration": 4}
    sparse = receipt["patches"][1]
    assert (sparse["id"], sparse["state"]) == ("dsa-memory", "active")
    assert list(sparse["called_on_ranks"].values()) == [[0, 1]]  # a sparse layer on each
    plain = read_metrics(run[0] / "metrics.jsonl")
    assert json.loads((run[0] / "receipt.json").read_text())["fused_cross_entropy"] is None
    for mine, theirs in zip(records[:2], plain[:2], strict=True):  # then the gates differ
        # Keys of equal score are chosen otherwise, so that it is not to the last digit.
        assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-3)


def test_every_second_iteration_is_diagnosed(full_run):
    _, records, _ = full_run
    for record in records:
        assert ("stp_effective_rank_by_tap" in record) == (record["iteration"] % 2 == 0)
    last, closed = records[-1], records[1]
    assert all(1 < rank < 128 for rank in last["stp_effective_rank_by_tap"].values())
    assert all(0 < share < 1 for share in last["stp_gradient_share_by_tap"].values())
    assert set(closed["stp_gradient_share_by_tap"].values()) == {None}  # the gate is closed
    assert last["stp_clock_share_by_tap"].keys() == set(NAMES)


def test_the_board_shows_what_the_metrics_say(full_run):
    _, records, board = full_run
    for name in NAMES:
        losses = [record["stp_loss_by_tap"][name] for record in records]
        assert board[f"stp loss/{name}"] == pytest.approx(losses, rel=1e-6)
    assert board["stp weight"] == pytest.approx([record["stp_weight"] for record in records])
    assert board["stp loss"] == pytest.approx([record["stp_loss"] for record in records], rel=1e-6)
    assert len(board["stp effective rank/12"]) == 3
    for name, tag in OF_THE_RUN.items():
        said = [record[name] for record in records if record[name] is not None]
        assert board.get(tag, []) == pytest.approx(said, rel=1e-6), tag
    for name, tag in (("lm_loss", "lm loss"), ("grad_norm", "grad-norm"), ("loss_scale", "loss-scale")):
        assert board[tag] == pytest.approx([record[name] for record in records], rel=1e-6)
    # Megatron writes the rate of the step to come.
    assert board["learning-rate"][:-1] == pytest.approx([record["learning_rate"] for record in records[1:]], rel=1e-6)
    assert all(len(values) <= len(records) for values in board.values())


def test_what_it_left_fits_the_schemas(full_run, run):
    require_run_fits(full_run[0])
    digests = [json.loads((each / "receipt.json").read_text())["weights_sha256"] for each in (full_run[0], run[0])]
    assert None not in digests
    assert digests[0] != digests[1]
