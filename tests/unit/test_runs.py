"""Reading what a run left, whole or damaged."""

import json

import pytest
from rich.console import Console

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.failures import first_failure, report_failure
from megacpp_stp.runs.files import create_run_directory, read_json, write_json
from megacpp_stp.runs.metrics import MetricsWriter, read_metrics
from megacpp_stp.runs.receipt import Receipt, plan_facts, without_places
from megacpp_stp.runs.summary import print_summary, summarise
from tests.unit.made_runs import answer


@pytest.fixture
def run(tmp_path):
    """A finished run of two iterations, one on each side of the gate."""
    directory = tmp_path / "run"
    create_run_directory(directory)
    receipt = Receipt.create(directory, plan_facts(build_plan(load_recipe("nam56r-tiny")).as_dict()))
    writer = MetricsWriter(directory / "metrics.jsonl")
    for iteration, active in ((1, False), (2, True)):
        writer.write({"iteration": iteration, "lm_loss": 2.0 / iteration, "stp_active": active, "tokens_per_s": 10.0})
    writer.close()
    receipt.complete(iterations_done=2, validation=[{"iteration": 2, "lm_loss": 1.5, "bits_per_byte": 0.5}])
    return directory


def test_a_summary_splits_at_the_gate(run, capsys):
    phases = summarise(run)["phases"]
    assert phases["before the gate"]["lm_loss"] == {"first": 2.0, "last": 2.0}
    assert phases["after the gate"]["iterations"] == [2, 2]
    print_summary(run, Console(width=200))
    assert "validation after iteration 2: 1.500 nats a token, 0.500 bits a byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("receipt.json", "{}"),
        ("receipt.json", "[]"),
        ("receipt.json", "{"),
        ("receipt.json", "[" * 100_000),
        ("receipt.json", '{"receipt_version": 99}'),
        ("receipt.json", "\xff"),
        ("metrics.jsonl", '{"stp_active": true}\n{"iteration": 1}\n'),
        ("metrics.jsonl", '{"iteration": 1, "lm_loss": "a"}\n{"iteration": 2}\n'),
        ("metrics.jsonl", '{"iteration": 1, "lm_loss": true}\n{"iteration": 2}\n'),
        ("metrics.jsonl", '{"iteration": 1, "lm_loss": NaN}\n{"iteration": 2}\n'),
        ("metrics.jsonl", "[]\n{}\n"),
    ],
)
def test_a_damaged_file_is_one_clear_error(run, name, content):
    (run / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        summarise(run)
    assert name in caught.value.field


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("recipe", "x"),
        ("recipe", {}),
        ("status", "fine"),
        ("reason", 7),
        ("parameters", {"total": 1}),
        ("parameters", [1]),
        ("validation", {}),
        ("validation", [{"iteration": 1}]),
    ],
)
def test_a_receipt_with_a_wrong_part_is_an_error(run, field, wrong):
    receipt = read_json(run / "receipt.json")
    write_json(run / "receipt.json", {**receipt, field: wrong})
    with pytest.raises(UserError):
        summarise(run)
    for missing in ("substrate", "parameters", "reason"):
        write_json(run / "receipt.json", {key: value for key, value in receipt.items() if key != missing})
        with pytest.raises(UserError):
            summarise(run)


def test_a_torn_last_line_is_left_out(run):
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"iteration": 3, "lm_lo')
    assert [record["iteration"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]


def test_a_run_without_an_iteration_can_be_shown(run):
    (run / "metrics.jsonl").unlink()
    assert summarise(run)["phases"] == {}
    print_summary(run, Console())


def test_first_and_last_do_not_overlap(run):
    """Ten iterations whose first ten are their last ten would show no change, whatever happened."""
    with open(run / "metrics.jsonl", "w") as handle:
        for i in range(1, 35):
            handle.write(json.dumps({"iteration": i, "lm_loss": 100.0 - i, "stp_active": i > 10}) + "\n")
    before, after = (summarise(run)["phases"][f"{side} the gate"] for side in ("before", "after"))
    assert (before["window"], before["lm_loss"]) == (5, {"first": 97.0, "last": 92.0})
    assert (after["window"], after["lm_loss"]) == (10, {"first": 100 - 15.5, "last": 100 - 29.5})


def test_a_run_in_detail_answers_what_ran(run):
    """The four questions of a receipt, for somebody who has only this command."""
    receipt = read_json(run / "receipt.json")
    found = {
        "collected": {"taps": [6, 12], "auxiliary": {"load_balancing_loss": [0, 1]}},
        "patches": [{"id": "dsa-memory", "state": "active"}],
        "code": {"commit": "b" * 40, "sha256": "c" * 64, "modified": True},
        "substrate": {"hardware": {"device": "cpu"}, "python": "3.12.1", "packages": {"torch": "2.15.0"}},
    }
    write_json(run / "receipt.json", {**receipt, **found})
    text = answer("show", run)
    for words in (
        "nam_torch_stack_spec of megacpp_stp.model.specs, backend torch",
        "AEMEAEMEAEMR",
        "+EMEDEME|DEMM",
        "dsa-memory active",
        "weight 0.02 from iteration 151, 4 spans a sequence",
        "asked for 6, 12; fed 6, 12",
        "asked for dsa_indexer 0.001, moe_load_balancing 0.0001; not 0 at the start: load_balancing_loss",
        f"commit {'b' * 12} and changes, sha256 {'c' * 12}",
        "training 1234, STP 1234",
        "torch 2.15.0",
        "before the gate",
    ):
        assert words in text, words
    strange = {
        "patches": {"x": 1},
        "collected": [],
        "auxiliary_losses": 7,
        "pattern": "x",
        "seeds": None,
        "code": "\x1b[2J",
    }
    write_json(run / "receipt.json", {**receipt, **strange})
    assert "(cannot be read)" in (text := answer("show", run)) and "\x1b[2J" not in text


def test_a_foreign_receipt_cannot_dress_up_the_terminal(run, capsys):
    receipt = read_json(run / "receipt.json")
    foreign = {"status": "incomplete", "reason": "gone\x1b[2J\nand [/x] more"}
    write_json(run / "receipt.json", {**receipt, **foreign, "recipe": {**receipt["recipe"], "name": "[/x]\x1b[31m"}})
    print_summary(run, Console(width=200, force_terminal=True, color_system=None))
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\x1b[31m" not in shown
    assert "[/x]" in shown and "and [/x] more" in shown


def test_numbers_that_are_none_are_null(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"iteration": 1, "lm_loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"iteration": 1, "lm_loss": None, "grad_norm": None}


def test_the_first_failure_counts_and_a_user_error_before_all(tmp_path):
    report_failure(tmp_path, rank=1, error=FloatingPointError("lm loss is nan"))
    report_failure(tmp_path, rank=0, error=RuntimeError("connection reset"))
    assert first_failure(tmp_path)["rank"] == 1
    report_failure(tmp_path, rank=2, error=UserError("no", field="x"))
    assert first_failure(tmp_path)["rank"] == 2
    (tmp_path / "error-2.json").write_text("{")
    assert first_failure(tmp_path)["rank"] == 1


def test_a_reason_names_no_place():
    text = (
        "[/pytorch/third_party/gloo/pair.cc:144] Connection reset by [127.0.0.1]:2344\nRank 1, node box-7, iteration 3"
    )
    assert without_places(text) == "[pair.cc:144] Connection reset by (an address) Rank 1, node (a host) iteration 3"
    assert without_places("no rank met (node-7, 29500) in time") == "no rank met (an address) in time"
    assert without_places("2 nodes, the first node h7 have") == "2 nodes, the first node (a host) have"
    assert len(without_places("x" * 5000)) < 500


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("rank 1 on node 10-a has torch 2", "rank 1 on node (a host) has torch 2"),
        ("node 10.rack.example went silent", "node (a host) went silent"),
        ("node 3_b: gone", "node (a host) gone"),
        ("no rank met (10-a, 29500) in time", "no rank met (an address) in time"),
        ("cannot write to /scratch: full", "cannot write to (a path): full"),
        ("'/scratch' and /scratch/ and =/data", "'(a path)' and (a path)/ and =(a path)"),
        ("node 3 and node 0: 2 of them, node 12. End", "node 3 and node 0: 2 of them, node 12. End"),
        ("1/2 of 7 tokens/s and/or (loss)/step, n/a / 4", "1/2 of 7 tokens/s and/or (loss)/step, n/a / 4"),
        ("/data/run/file.py", "file.py"),
    ],
)
def test_names_that_look_like_numbers_and_short_paths_are_places_too(text, left):
    assert without_places(text) == left


def test_a_run_directory_is_made_once(tmp_path):
    create_run_directory(tmp_path / "a")
    for taken in (tmp_path / "a", tmp_path):
        with pytest.raises(UserError):
            create_run_directory(taken)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        create_run_directory(tmp_path / "file" / "run")
