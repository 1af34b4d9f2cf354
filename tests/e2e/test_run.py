"""One real run: torchrun, two pipeline stages, Megatron's pretrain(), data from disk."""

import json
import math

import pytest

from megacpp_stp.data.manifest import load_manifest
from megacpp_stp.patches.agreement import digest
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.recipe import restore_recipe
from megacpp_stp.runs.metrics import read_metrics
from tests.unit.test_runs_schema import require_run_fits


def load(run, name):
    return json.loads((run[0] / name).read_text())


def test_megatron_logs_and_one_table_ends_it(run):
    output = run[1].stdout
    assert "iteration        6/       6" in output
    assert output.count("| stp loss:") == 6
    assert "validation loss at iteration 3" in output
    table = output[output.index("nam56r-tiny: complete") :]
    for text in ("before the gate", "after the gate", "bits a byte", "tokens/s", "parameters:", str(run[0])):
        assert text in table


def test_the_plan_on_disk_is_the_plan_that_was_asked_for(run, cli, short_run):
    asked = cli("plan", *short_run[1:], "--format", "json")
    assert load(run, "plan.json") == json.loads(asked.stdout)


def test_metrics_have_every_iteration_and_the_gate(run, dataset):
    records = read_metrics(run[0] / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["stp_active"] for record in records] == [False] * 3 + [True] * 3
    manifest = load_manifest(dataset)
    flops = cost_of(build_plan(restore_recipe(load(run, "plan.json")["recipe"]))).flops.training
    for record in records:
        assert 0 < record["stp_loss"] < 2
        by_tap = record["stp_loss_by_tap"]
        assert set(by_tap) == {"6", "12"}
        assert record["stp_loss"] == pytest.approx(sum(by_tap.values()) / 2)
        weighted = 0.02 * record["stp_loss"] if record["stp_active"] else 0.0
        assert record["stp_weighted"] == pytest.approx(weighted)
        assert record["tokens"] == record["loss_tokens"] == 8 * 64
        assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["step_time_s"])
        assert record["tflops_per_gpu"] == pytest.approx(flops * record["tokens_per_s"] / 2 / 1e12)
        assert record["mfu"] is None and record["skipped_iterations"] == 0 and 0 < record["goodput"] < 1
        assert record["grad_norm"] > 0
        assert record["peak_memory_bytes"] > 100 * 2**20
        bits = record["lm_loss"] / math.log(2) / manifest.bytes_per_token("train")
        assert record["bits_per_byte"] == pytest.approx(bits)
    # An untrained model knows the vocabulary's size and nothing else.
    assert records[0]["lm_loss"] == pytest.approx(math.log(512), abs=0.5)
    assert records[-1]["lm_loss"] < records[0]["lm_loss"]


def test_console_and_metrics_agree(run):
    """Upstream logs the first iteration without starting its sums anew, so its second line averages both."""
    console = [line for line in run[1].stdout.splitlines() if "| lm loss:" in line]
    records = read_metrics(run[0] / "metrics.jsonl")
    for number, line in enumerate(console):
        fields = dict(part.split(":", 1) for part in line.split("|") if part.count(":") == 1)
        averaged = records[:2] if number == 1 else [records[number]]
        for name, key in ((" lm loss", "lm_loss"), (" stp loss", "stp_loss")):
            mean = sum(record[key] for record in averaged) / len(averaged)
            assert float(fields[name]) == pytest.approx(mean, rel=1e-5)
        assert float(fields[" grad norm"]) == pytest.approx(records[number]["grad_norm"], abs=1e-3)
    assert len(console) == len(records)


def test_the_receipt_answers_its_questions(run):
    receipt, plan = load(run, "receipt.json"), load(run, "plan.json")
    assert (receipt["status"], receipt["reason"], receipt["iterations_done"]) == ("complete", None, 6)
    assert receipt["plan_digest"] == plan["digest"]
    assert receipt["stack"] == "megacpp_stp.model.stack.NamStack"
    assert receipt["pattern"]["megatron"] == "+EMEDEME|DEMM"
    assert receipt["pattern"]["stand_ins"] == {}
    assert receipt["pattern"]["seams"]["12"] == "m2rnn in a Mamba slot"
    assert receipt["auxiliary_losses"]["dsa_indexer"] == 0.001
    assert receipt["auxiliary_losses"]["stp"]["taps"] == receipt["collected"]["taps"] == [6, 12]
    # Layers of experts and of sparse attention are on both stages.
    assert receipt["collected"]["auxiliary"] == {"indexer loss": [0, 1], "load_balancing_loss": [0, 1]}
    assert receipt["windows"] == {"dormant": [1, 3], "warming": None, "active": [4, 6]}
    assert receipt["stp_iterations"] == {"dormant": 3, "warming": 0, "active": 3, "without_a_span": 0}
    records = read_metrics(run[0] / "metrics.jsonl")
    totals = receipt["totals"]
    assert (totals["iterations"], totals["tokens"], totals["skipped_iterations"]) == (6, 6 * 8 * 64, 0)
    assert totals["training_time_s"] == pytest.approx(sum(record["step_time_s"] for record in records))
    assert 0 < totals["goodput"] <= records[-1]["goodput"]
    assert receipt["best"] == min(receipt["validation"], key=lambda found: found["lm_loss"])
    assert receipt["code"]["version"] and len(receipt["code"]["sha256"]) == len(receipt["weights_sha256"]) == 64
    assert receipt["recipe"]["provenance"] == "project-defined"
    (patch,) = receipt["patches"]
    assert (patch["id"], patch["state"], receipt["allowed_unreviewed"]) == ("dataset-helpers", "active", [])
    assert patch["called_on_ranks"] == {"megatron.training.initialize:_compile_dependencies": [0]}
    assert receipt["patches_digest"] == digest(load(run, "patches.json")["1"])
    assert "device=" in receipt["cpu_backend"]
    assert receipt["substrate"]["packages"]["megatron-core"].startswith("0.19.")
    assert sum(receipt["parameters"]["by_pipeline_rank"]) == receipt["parameters"]["total"] > 0
    assert load(run, "patches.json").keys() == {"0", "1"}
    assert load(run, "exit.json") == receipt["exit"] == {"status": 0, "torchrun_returncode": 0, "signal": None}
    assert load(run, "env.json")["OMP_NUM_THREADS"] == receipt["environment"]["OMP_NUM_THREADS"] == "1"
    assert plan["env"].items() <= receipt["environment"].items() <= load(run, "env.json").items()


def test_what_it_left_fits_the_schemas(run):
    require_run_fits(run[0])


def test_nothing_of_the_machine_is_in_the_receipt(run):
    """No path and no host: a receipt is for strangers."""
    import socket

    text = json.dumps(load(run, "receipt.json"))
    assert '"data.path=(a place)"' in text
    assert "/" not in text.replace("tokens/s", "")
    assert socket.gethostname() not in text


def test_runs_show_prints_the_same_table_again(run, cli):
    shown = cli("runs", "show", str(run[0]))
    assert shown.returncode == 0
    what_ran, table = shown.stdout.split("nam56r-tiny: complete")
    assert table.strip() in run[1].stdout
    for words in ("AEMEAEMEAEMR", "dataset-helpers active", "asked for 6, 12; fed 6, 12", "load_balancing_loss"):
        assert words in what_ran, words
    facts = json.loads(cli("runs", "show", str(run[0]), "--format", "json").stdout)
    assert facts["phases"]["before the gate"]["iterations"] == [1, 3]


def test_a_run_directory_is_never_written_twice(run, cli, short_run):
    before = {path.name: path.read_bytes() for path in run[0].iterdir() if path.is_file()}
    again = cli(*short_run, "--run-dir", str(run[0]))
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert before == {path.name: path.read_bytes() for path in run[0].iterdir() if path.is_file()}
