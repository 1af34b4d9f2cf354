"""Runs that end badly leave a receipt that says so."""

import json
import shutil
import signal
import subprocess
import time

import pytest

from megacpp_stp.plan.build import plan_digest
from tests.e2e.conftest import command, environment


def load(directory, name):
    return json.loads((directory / name).read_text())


def test_a_rank_that_raises_leaves_an_incomplete_receipt(cli, short_run, dataset, tmp_path):
    """Token ids beyond the vocabulary: sizes are right, so only training can notice."""
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    size = (broken / "train.bin").stat().st_size
    (broken / "train.bin").write_bytes(b"\xff" * size)
    run = tmp_path / "run"
    done = cli(*short_run, "--set", f"data.path={broken}", "--run-dir", str(run))
    assert done.returncode == 1
    receipt = load(run, "receipt.json")
    assert (receipt["status"], receipt["failure_kind"], receipt["iterations_done"]) == ("incomplete", "crash", 0)
    assert "Error" in receipt["reason"]
    assert receipt["ended"] is not None
    assert "incomplete: " in done.stdout
    assert load(run, "exit.json")["status"] == 1


def test_a_signal_ends_all_ranks_and_is_told(short_run, tmp_path):
    run = tmp_path / "run"
    arguments = [*short_run, "--set", "training.iterations=100000", "--run-dir", str(run)]
    log = tmp_path / "log"  # a pipe that nobody reads would fill and stop the run
    with log.open("w") as output:
        child = subprocess.Popen(command(*arguments), stdout=output, stderr=subprocess.STDOUT, env=environment())
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert child.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=90)
    finally:
        child.kill()
    assert child.returncode == 128 + signal.SIGTERM
    receipt = load(run, "receipt.json")
    assert receipt["status"] == "incomplete"
    assert load(run, "exit.json")["signal"] == "SIGTERM"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(run) not in listed


def entry(plan, run, *more):
    """The entry as torchrun calls it, with arguments of one's own."""
    arguments = [*more, "--nam-plan", str(plan), "--nam-run-dir", str(run)]
    program = [*command()[:1], "-m", "megacpp_stp.training.entry", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env={**environment(), "RANK": "0"})


@pytest.fixture
def plan(cli, short_run, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(cli("plan", *short_run[1:], "--format", "json").stdout)
    return path


def test_a_rank_refuses_arguments_that_are_not_the_plans(plan, tmp_path):
    argv = json.loads(plan.read_text())["argv"]
    argv[argv.index("--lr") + 1] = "1.0"
    done = entry(plan, tmp_path, *argv)
    assert done.returncode == 2
    assert "'1.0' instead of '0.003'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_refuses_an_edited_plan(plan, tmp_path):
    content = json.loads(plan.read_text())
    content["recipe"]["stp"]["weight"] = 9.0
    plan.write_text(json.dumps(content))
    done = entry(plan, tmp_path, *content["argv"])
    assert done.returncode == 2
    assert "it was edited" in done.stderr
    assert plan_digest(content) != content["digest"]
