"""`megacpp-stp runs compare --assert-equal`: two runs are one, bit for bit, or where they part."""

import json

import pytest

from megacpp_stp.runs.files import read_json, write_json
from tests.unit.made_runs import ITERATIONS, loss_of, make_run, refused, runs

WITHOUT = "stp=null"


def check(*arguments):
    done = runs("compare", *arguments, "--assert-equal", "--format", "json")
    content = json.loads(done.stdout)
    assert done.exit_code == int(not all(pair["equal"] for pair in content))
    return content


def rewrite(run, iteration, **values):
    """Other values in one record."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[iteration - 1])
    lines[iteration - 1] = json.dumps({**record, **values}) + "\n"
    path.write_text("".join(lines))


@pytest.fixture
def pair(tmp_path):
    return make_run(tmp_path / "a"), make_run(tmp_path / "b", speed=2000.0)


def test_equal_runs_are_equal_whatever_their_speed(pair):
    (found,) = check(*pair)
    assert found["equal"]
    assert found["iterations"] == ITERATIONS
    assert found["validations"] == 1
    assert {"lm_loss", "grad_norm", "stp_loss_by_tap.12"} <= set(found["names"])
    assert not {"step_time_s", "tokens_per_s", "peak_memory_bytes"} & set(found["names"])
    done = runs("compare", *pair, "--assert-equal")
    assert done.exit_code == 0
    assert "a and b are equal bit for bit: 40 iterations" in done.stdout
    assert "not compared: step_time_s" in done.stdout


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"lm_loss": loss_of(7) * (1 + 2**-52)}, "lm_loss"),
        ({"grad_norm": 1}, "grad_norm"),
        ({"grad_norm": None}, "grad_norm"),
        ({"skipped": True}, "skipped"),
        ({"stp_loss_by_tap": {"6": 0.25, "12": 0.5}}, "stp_loss_by_tap.12"),
        ({"new": -0.0}, "new"),
    ],
)
def test_the_first_difference_ends_it(pair, values, name):
    rewrite(pair[1], 7, **values)
    rewrite(pair[1], 9, lm_loss=1.0)
    (found,) = check(*pair)
    assert (found["first_difference"]["iteration"], found["first_difference"]["name"]) == (7, name)
    done = runs("compare", *pair, "--assert-equal")
    assert done.exit_code == 1
    assert f"a and b differ first in iteration 7: {name} is" in done.stdout
    assert check(*pair, "--window", ":6")[0]["equal"]
    assert check(*pair, "--window", "8:8")[0]["equal"]


def test_the_loss_comes_first_among_those_of_an_iteration(pair):
    rewrite(pair[1], 7, lm_loss=1.0, bits_per_byte=1.0)
    difference = check(*pair)[0]["first_difference"]
    assert (difference["name"], difference["names"]) == ("lm_loss", 2)


def test_a_run_that_ended_earlier_is_not_equal(tmp_path):
    a = make_run(tmp_path / "a", validation={20: 4.0})
    b = make_run(tmp_path / "b", iterations=30, complete=False, validation={20: 4.0})
    (found,) = check(a, b)
    assert (found["first_difference"]["iteration"], found["first_difference"]["name"]) == (31, "record")
    (found,) = check(a, b, "--window", ":30")
    assert found["equal"]
    assert any("b did not do" in line for line in found["not_compared"])


def test_evaluations_and_final_weights_count(pair):
    for run, loss in zip(pair, (3.0, 3.5), strict=True):
        receipt = read_json(run / "receipt.json")
        twice = [{"iteration": 40, "lm_loss": value, "bits_per_byte": 1.0} for value in (4.0, loss)]
        write_json(run / "receipt.json", {**receipt, "validation": twice, "weights_sha256": f"{loss}"})
    difference = check(*pair)[0]["first_difference"]
    assert (difference["name"], difference["a"], difference["b"]) == ("validation again lm_loss", 3.0, 3.5)
    receipt = read_json(pair[0] / "receipt.json")
    write_json(pair[1] / "receipt.json", {**receipt, "weights_sha256": "other"})
    assert check(*pair)[0]["first_difference"]["name"] == "weights_sha256"
    write_json(pair[1] / "receipt.json", receipt)
    (found,) = check(*pair)
    assert found["equal"]
    assert found["weights"]
    assert found["validations"] == 2
    assert not any("weights" in line for line in found["not_compared"])
    (found,) = check(*pair, "--window", "1:")
    assert not found["weights"]
    assert "the final weights: they are of the whole runs, and a window was asked for" in found["not_compared"]


@pytest.mark.parametrize(
    "other", [{"pattern": {"megatron": "M|M"}}, {"topology": {"tensor": 2}}, {"weights_sha256": None}]
)
def test_weights_of_unlike_layouts_are_not_compared_and_that_is_said(pair, other):
    for run, more in zip(pair, ({"weights_sha256": "a"}, {"weights_sha256": "b"} | other), strict=True):
        write_json(run / "receipt.json", {**read_json(run / "receipt.json"), **more})
        (run / "plan.json").unlink()  # which would say otherwise
    (found,) = check(*pair)
    assert found["equal"]
    assert not found["weights"]
    assert any(line.startswith("the final weights: ") for line in found["not_compared"])


def test_weight_0_is_a_run_without_stp(tmp_path):
    """What a run measures besides does not count against it, and is named."""
    a, b = make_run(tmp_path / "a", WITHOUT), make_run(tmp_path / "b", "stp.weight=0")
    (found,) = check(a, b)
    assert found["equal"]
    assert "stp_active, stp_loss, stp_loss_by_tap, stp_weight: measured by one run only" in found["not_compared"]


def test_each_run_is_compared_with_the_first(pair, tmp_path):
    third = make_run(tmp_path / "c", loss=lambda i: loss_of(i) + (i == 3))
    assert [found["equal"] for found in check(*pair, third)] == [True, False]


@pytest.mark.parametrize(
    "more", [("--metric", "grad_norm"), ("--allow-unlike",), ("--window", "99:"), ("--window", "x")]
)
def test_what_makes_no_sense_with_it_is_refused(pair, more):
    refused("compare", *pair, "--assert-equal", *more)


@pytest.mark.parametrize("lost", ["stp_loss", "stp_loss_by_tap"])
def test_a_value_that_both_runs_should_have_and_one_lacks_throughout_is_a_difference(pair, lost):
    """It is not one that only the other was asked to measure."""
    path = pair[1] / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record[lost] = {"6": record[lost]["6"]} if isinstance(record[lost], dict) else record.pop(lost) and None
        if record[lost] is None:
            del record[lost]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (found,) = check(*pair)
    name = {"stp_loss": "stp_loss", "stp_loss_by_tap": "stp_loss_by_tap.12"}[lost]
    assert not found["equal"] and found["first_difference"]["name"] == name


def test_what_one_run_alone_was_asked_to_measure_is_left_out_and_named(tmp_path):
    diagnosed = make_run(tmp_path / "a", "stp.diagnose_every=1", "stp.weight=0")
    for iteration in range(1, ITERATIONS + 1):
        rewrite(diagnosed, iteration, stp_effective_rank_by_tap={"6": 3.0})
    plain = make_run(tmp_path / "b", "stp.weight=0")
    (found,) = check(diagnosed, plain)
    assert found["equal"] and "stp_effective_rank_by_tap: measured by one run only" in found["not_compared"]
    other_taps = make_run(tmp_path / "c", "stp.taps=[6]", "stp.weight=0")
    for iteration in range(1, ITERATIONS + 1):
        rewrite(other_taps, iteration, stp_loss_by_tap={"6": 0.25})
    (found,) = check(plain, other_taps)
    assert found["equal"] and any(text.startswith("stp_loss_by_tap") for text in found["not_compared"])


def test_each_evaluation_counts(pair):
    for place, run in enumerate(pair):
        receipt = read_json(run / "receipt.json")
        receipt["validation"] = [receipt["validation"][0]] * (2 + place)
        write_json(run / "receipt.json", receipt)
    (found,) = check(*pair)
    assert found["first_difference"]["name"] == "validation again again lm_loss" and found["validations"] == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [('"lm_loss":', '"lm_loss": 1.5, "lm_loss":'), ('"lm_loss":', '"stp_loss_by_tap.6": 0.25, "lm_loss":')],
)
def test_a_name_that_is_there_twice_hides_nothing(pair, old, new):
    path = pair[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    assert refused("compare", *pair, "--assert-equal").fix == "the file is damaged; use another run"
    path = pair[0] / "receipt.json"
    path.write_text(path.read_text().replace('"status":', '"status": "complete", "status":', 1))
    assert "is not JSON" in refused("show", pair[0]).problem
