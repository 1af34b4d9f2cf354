"""`megacpp-stp runs compare`: what it pairs, where, what it refuses and what it says aloud."""

import json
import math
import re

import pytest

from megacpp_stp.runs.compare import compare_runs
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.gate import Gate
from megacpp_stp.stp.config import StpConfig
from tests.unit.made_runs import (
    GATE,
    ITERATIONS,
    answer,
    changed,
    compare,
    loss_of,
    make_run,
    noise,
    refused,
)

WITHOUT = "stp=null"


@pytest.fixture
def pair(tmp_path):
    """A run without STP, and one that is 0.5 better once its gate is open."""
    base = make_run(tmp_path / "base", WITHOUT, validation={10: 2.0, 20: 4.5, 40: 3.0})
    other = make_run(tmp_path / "stp", loss=lambda i: loss_of(i) - 0.5 * (i > GATE), validation={20: 4.0, 40: 4.25})
    return base, other


def test_two_runs_are_compared_where_stp_acts(pair):
    found = compare(*pair)
    assert found["title"] == f"controlled comparison: lm_loss, iterations {GATE + 1} to {ITERATIONS}"
    assert found["window"]["iterations"] == ITERATIONS - GATE
    base, other = found["runs"]
    assert (base["arm"], base["name"], base["regimes"], base["gate"]) == ("A", "base", {}, None)
    assert (other["arm"], other["regimes"], other["gate"]) == ("B", {"active": ITERATIONS - GATE}, GATE + 1)
    assert other["best"] == {"value": pytest.approx(loss_of(40) - 0.5), "iteration": 40}
    assert other["best_validation"] == {"value": 4.0, "iteration": 20}
    assert base["best_validation"] == {"value": 3.0, "iteration": 40}
    window = range(GATE + 1, ITERATIONS + 1)
    assert base["mean"] == pytest.approx(math.fsum(map(loss_of, window)) / len(window))
    (result,) = found["pairs"]
    assert result["difference"] == pytest.approx(-0.5)
    assert result["relative"] == pytest.approx(-0.5 / base["mean"])
    assert result["verdict"] == "lower"
    assert result["controlled"]
    assert result["standing"] == "controlled: only stp differs"
    assert re.fullmatch(r"moving blocks of \d+, over 30 iterations of 1 seed", result["method"])


def test_the_table_says_it_too(pair):
    text = answer("compare", *pair)
    for words in (
        "controlled comparison: lm_loss, iterations 11 to 40",
        "STP has all of its weight in each run that has it",
        "0.02 from 11",
        "B - A: -0.5 (",
        ": lower",
        "3 @ 40",
        "4 @ 20",
        "stp: A none, B diagnose_every 0, n_spans 4",
        "weight 0.02",
        "note: an interval over iterations says nothing of other seeds",
    ):
        assert words in text, words


def test_a_difference_that_noise_could_make_is_none(tmp_path):
    make_run(tmp_path / "a", WITHOUT)
    make_run(tmp_path / "b", loss=lambda i: loss_of(i) + 0.01 * noise(i, 5))
    (result,) = compare(tmp_path / "a", tmp_path / "b")["pairs"]
    assert result["verdict"] == "no difference shown"
    assert result["interval"]["low"] < 0 < result["interval"]["high"]


def test_other_metrics_and_parts_of_them(pair):
    bits = compare(*pair, "--metric", "bits_per_byte")
    assert bits["pairs"][0]["difference"] == pytest.approx(-0.5 / 3)
    assert bits["runs"][0]["best_validation"] == {"value": 1.0, "iteration": 40}
    assert "(bits a byte)" in answer("compare", *pair, "--metric", "bits_per_byte")
    assert "(nats a token)" in answer("compare", *pair, "--metric", "grad_norm")
    fast = compare(*pair, "--metric", "tokens_per_s")
    assert fast["runs"][0]["best"] == {"value": 1040.0, "iteration": 40}
    assert compare(*pair, "--metric", "learning_rate")["runs"][0]["best"] is None
    both = pair[1], make_run(pair[1].with_name("other"), "stp.weight=0.5")
    assert compare(*both, "--metric", "stp_loss_by_tap.12")["runs"][0]["mean"] == 0.75
    for metric in ("nothing", "stp_loss", "stp_loss_by_tap.6", "stp_loss_by_tap", ""):
        error = refused("compare", *pair, "--metric", metric)
        assert error.field == "--metric"
        assert "lm_loss" in error.fix


# Windows


@pytest.mark.parametrize(
    ("window", "iterations"), [("15:20", range(15, 21)), ("35:", range(35, 41)), (":12", range(1, 13))]
)
def test_a_window_that_was_asked_for(pair, window, iterations):
    found = compare(*pair, "--window", window)
    assert found["window"] == {
        "first": iterations[0],
        "last": iterations[-1],
        "iterations": len(iterations),
        "why": "as asked for",
    }
    notes = [note for note in found["notes"] if note.startswith("stp: ")]
    assert notes == (["stp: the iterations are 10 dormant, 2 active"] if window == ":12" else [])


def test_a_window_before_the_gate_is_refused_with_the_fix(pair):
    error = refused("compare", *pair, "--window", f"1:{GATE}")
    assert "wholly before the gate" in error.problem
    assert f"--window {GATE + 1}:" in error.fix
    compare(*pair, "--window", f"1:{GATE + 1}")


@pytest.mark.parametrize("window", ["", ":", "5", "0:5", "5:0", "7:6", "a:b", "-1:5", "1:2:3", "1:5\n", "٣:٤x"])
def test_a_window_that_is_none_is_refused(pair, window):
    assert "is no window of iterations" in refused("compare", *pair, f"--window={window}").problem
    assert "holds none of the iterations" in refused("compare", *pair, "--window", "41:").problem


def test_the_ramp_is_left_out_unless_a_run_ended_on_it(tmp_path):
    make_run(tmp_path / "a", WITHOUT)
    make_run(tmp_path / "b", "stp.ramp_steps=8")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found["window"]["first"] == GATE + 8
    asked = compare(tmp_path / "a", tmp_path / "b", "--window", "8:20")
    assert asked["runs"][1]["regimes"] == {"dormant": 3, "warming": 7, "active": 3}
    make_run(tmp_path / "c", "stp.ramp_steps=20", iterations=25, complete=False)
    found = compare(tmp_path / "a", tmp_path / "c")
    assert (found["window"]["first"], found["window"]["last"]) == (GATE + 1, 25)
    assert "a part of its weight only" in found["window"]["why"]
    assert any("c is incomplete: killed by a test" in note for note in found["notes"])


def test_a_run_that_never_came_to_its_gate_is_refused(tmp_path):
    make_run(tmp_path / "a", WITHOUT)
    make_run(tmp_path / "b", iterations=GATE, complete=False)
    error = refused("compare", tmp_path / "a", tmp_path / "b")
    assert f"opens at iteration {GATE + 1}" in error.problem


def test_with_an_early_and_a_late_gate_the_window_is_where_both_act(tmp_path):
    a = make_run(tmp_path / "a", WITHOUT)
    early, late = make_run(tmp_path / "early"), make_run(tmp_path / "late", "stp.start_step=25")
    assert compare(a, early, late)["window"]["first"] == 26
    # Between the gates an open one may be compared with a closed one, which is named, but not a closed one with none.
    assert "late: the iterations are 10 dormant" in compare(early, late, "--window", "15:24")["notes"]
    assert "a and late differ in nothing" in refused("compare", a, early, late, "--window", "15:24").problem


def test_weight_0_is_no_feature(tmp_path):
    a, b = make_run(tmp_path / "a", WITHOUT), make_run(tmp_path / "b", "stp.weight=0")
    assert "--assert-equal" in refused("compare", a, b).fix
    c = make_run(tmp_path / "c", "stp.weight=0", "optimizer.lr=1e-3")
    assert compare(a, c)["title"].startswith("NOT CONTROLLED: lm_loss, iterations 1 to 40")


def test_what_is_not_stp_is_compared_over_the_whole_run(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "optimizer.lr=1e-3")
    found = compare(a, b)
    assert found["title"] == "NOT CONTROLLED: lm_loss, iterations 1 to 40"
    assert found["pairs"][0]["standing"] == "not controlled: optimizer.lr differs"
    assert found["pairs"][0]["differences"] == [{"path": "optimizer.lr", "a": 0.003, "b": 0.001}]


@pytest.mark.parametrize(("weight", "start", "ramp"), [(0.5, 3, 0), (0.5, 3, 1), (0.5, 3, 4), (0.0, 3, 4), (0.5, 0, 2)])
def test_regimes_are_those_of_the_schedule_that_trains(weight, start, ramp):
    gate = Gate(weight=weight, start_step=start, ramp_steps=ramp)
    config = StpConfig(weight=weight, n_spans=1, start_step=start, taps=(1,), seed=0, ramp_steps=ramp)
    for done in range(12):
        now = config.weight_at(done)
        assert gate.weight_at(done + 1) == now
        wanted = "dormant" if now == 0 else "active" if now == weight else "warming"
        assert gate.regime_at(done + 1) == wanted, done
    if weight:
        assert gate.regime_at(gate.first_active) == "active"
        assert gate.regime_at(gate.first_live) != "dormant"


# What must be alike


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("pattern", "source"), "AEMEAEMEAEMM"),
        (("topology", "tensor"), 2),
        (("seeds", "training"), 77),
        (("auxiliary_losses", "stp", "n_spans"), 9),
    ],
)
def test_a_receipt_that_says_otherwise_than_its_plan_is_refused(pair, path, value):
    """Tables show what the receipt says, and likeness is judged by the plan."""
    receipt = read_json(pair[1] / "receipt.json")
    write_json(pair[1] / "receipt.json", changed(receipt, path, value))
    error = refused("compare", *pair, "--allow-unlike")
    assert (
        f" {value}, and its plan " in error.problem
        and "its plan" in refused("report", pair[1], "--output", "x").problem
    )


def test_a_receipt_without_its_plan_is_not_controlled(pair):
    (pair[1] / "plan.json").unlink()
    found = compare(*pair)
    assert found["title"].startswith("NOT CONTROLLED")
    assert "a plan.json is missing" in found["pairs"][0]["standing"]


def test_a_run_that_changed_on_its_way_is_not_controlled(pair):
    receipt = read_json(pair[1] / "receipt.json")
    attempts = [receipt["attempts"][0], {**receipt["attempts"][0], "from_iteration": 20, "plan_digest": "x"}]
    write_json(pair[1] / "receipt.json", {**receipt, "attempts": attempts})
    found = compare(*pair)
    assert found["pairs"][0]["standing"] == "not controlled: stp went on with another plan"
    assert found["title"].startswith("NOT CONTROLLED")
    (pair[1] / "attempt-1").mkdir()
    write_json(pair[1] / "attempt-1" / "receipt.json", {**receipt, "substrate": {"hardware": {"device": "cuda"}}})
    assert "stp changed it on the way" in refused("compare", *pair).problem


# Whatever else


def test_runs_that_are_no_use_are_refused(pair, tmp_path):
    base, other = pair
    assert "compares with nothing" in refused("compare", base).problem
    assert "is named twice" in refused("compare", base, other, base / ".." / "base").problem
    assert "is no directory" in refused("compare", base, tmp_path / "none").problem
    (other / "metrics.jsonl").write_text("")
    assert "no whole record" in refused("compare", base, other).problem


def test_a_receipt_that_the_records_contradict_is_refused(pair):
    """STP that was configured and did not run, or ran at another time."""
    path = pair[1] / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"stp_active": true', '"stp_active": false'))
    assert (
        "says stp_active False in iteration 11, where the receipt's schedule says True"
        in refused("compare", *pair).problem
    )
    path.write_text(text.replace('"stp_weight": 0.02', '"stp_weight": 0.2'))
    assert (
        "says stp_weight 0.2 in iteration 11, where the receipt's schedule says 0.02"
        in refused("compare", *pair).problem
    )
    path.write_text(text.replace("stp_active", "x"))
    assert "says stp_active None in iteration 1" in refused("compare", *pair).problem
    (pair[0] / "metrics.jsonl").write_text(text)
    assert (
        "ends with lm_loss 2.15" in (problem := refused("compare", *pair).problem)
        and "and the receipt says 2.65" in problem
    )
    write_json(pair[0] / "receipt.json", {**read_json(pair[0] / "receipt.json"), "last": None})  # which does not say
    assert "says stp_weight 0 in iteration 1, where the receipt's schedule says nothing" in (
        refused("compare", *pair).problem
    )
    (pair[0] / "metrics.jsonl").write_text(text.replace("stp_weight", "x"))
    assert "says stp_active True in iteration 11, where" in refused("compare", *pair).problem


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "first" / "run", WITHOUT), make_run(tmp_path / "second" / "run")]
    assert [run["name"] for run in compare(*runs)["runs"]] == list(map(str, runs))


def test_iterations_without_a_value_are_left_out_and_said(pair):
    path = pair[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[29])
    lines[29] = json.dumps({**record, "lm_loss": None}) + "\n"
    path.write_text("".join(lines))
    found = compare(*pair)
    assert found["window"]["iterations"] == ITERATIONS - GATE - 1
    assert "stp has no value in 1 iteration of the window: left out" in found["notes"]


@pytest.mark.parametrize(("line", "iteration"), [(0, 0), (0, -1), (5, 5), (5, 3), (39, 10**40)])
def test_iterations_that_do_not_rise_are_refused(pair, line, iteration):
    path = pair[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[line] = json.dumps({**json.loads(lines[line]), "iteration": iteration}) + "\n"
    path.write_text("".join(lines))
    assert refused("compare", *pair).field.endswith("metrics.jsonl")


@pytest.mark.parametrize(
    "value", [1e308, -1e308, 10**90, pytest.param(10**400, id="huge"), "x", True, {"a": {}}, {"a": []}, []]
)
def test_values_that_are_no_use_are_refused(pair, value):
    path = pair[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"grad_norm": 1.0', f'"grad_norm": {json.dumps(value)}'))
    if value == 10**90:
        assert compare(*pair, "--metric", "grad_norm")["pairs"][0]["verdict"] == "higher"
    else:
        refused("compare", *pair, "--metric", "grad_norm")


@pytest.mark.parametrize(
    ("cut", "problem"),
    [(slice(None, -1), f"the complete run says {ITERATIONS}"), (slice(1, None), "iteration 2 follows 0")],
    ids=["end", "start"],
)
def test_a_file_that_was_cut_is_no_run(pair, cut, problem):
    path = pair[1] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[cut]))
    assert problem in refused("compare", *pair).problem


def test_too_few_iterations_have_a_difference_and_no_interval(pair):
    (result,) = compare(*pair, "--window", "15:20")["pairs"]
    assert (result["interval"], result["verdict"]) == (None, "no interval")
    assert "too few" in result["method"]
    assert "interval: 6 iterations of 1 seed, too few for one" in answer("compare", *pair, "--window", "15:20")


def test_values_that_differ_are_shown_leaf_by_leaf(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "stp.weight=0.5", "stp.taps=[3, 6, 12]")
    text = answer("compare", tmp_path / "a", tmp_path / "b")
    for words in (
        "controlled: only stp.taps, stp.weight differ\n",
        "stp.weight: A 0.02, B 0.5",
        "stp.taps: A [6, 12], B [3, 6, 12]",
    ):
        assert words in text, words


def test_the_answer_is_the_same_each_time(pair):
    assert compare_runs(pair).as_dict() == compare_runs(pair).as_dict()
    assert answer("compare", *pair, "--format", "json") == answer("compare", *pair, "--format", "json")
