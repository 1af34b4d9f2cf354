"""Runs that end badly leave a receipt that says so."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megacpp_stp.plan.build import plan_digest
from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.training.torchrun import AGENT_MODULE
from tests.e2e.conftest import command, environment
from tests.unit.test_runs_schema import require_run_fits


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
    assert receipt["reason"].startswith("rank ")
    assert receipt["ended"] is not None
    assert "incomplete: " in done.stdout
    assert "ChildFailedError" not in done.stdout + done.stderr  # torchrun's own traceback
    assert load(run, "exit.json")["status"] == 1


@pytest.mark.slow  # the same without torchrun: tests/parity/test_finite.py
def test_what_is_no_number_ends_the_run_and_says_so(cli, short_run, tmp_path):
    """A learning rate that blows the weights up at once: loss or gradient, ours or Megatron's check sees it first."""
    run = tmp_path / "run"
    rates = ("--set", "optimizer.lr=1e30", "--set", "optimizer.min_lr=0", "--set", "optimizer.warmup_iterations=0")
    done = cli(*short_run, *rates, "--run-dir", str(run))
    assert done.returncode == 1
    receipt = load(run, "receipt.json")
    assert receipt["failure_kind"] == "nonfinite"
    seen = r"rank \d: iteration (\d+): (lm loss|STP loss|gradient|norm of the gradient) .*is (nan|inf|-inf|not finite)"
    found = re.match(seen, receipt["reason"])
    assert found and int(found[1]) == receipt["iterations_done"] + 1
    assert receipt["iterations_done"] >= 1
    assert receipt["last"]["iteration"] == receipt["iterations_done"]
    assert receipt["reason"] in done.stdout.replace("\n", "")


@contextmanager
def long_run(short_run, run, tmp_path):
    """A run that would take hours, from its first record on."""
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
        yield child
    finally:
        child.kill()


def processes_of(run):
    """Numbers and command lines of the processes that name the run directory (ps may cut lines off)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end while we look
            arguments = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(run) in arguments:
                found[int(path.parent.name)] = arguments
    return found


def ranks_of(run):
    return [pid for pid, args in processes_of(run).items() if "-m megacpp_stp.training.entry" in args[:200]]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_ends_all_ranks_and_is_told(short_run, tmp_path, number):
    run = tmp_path / "run"
    with long_run(short_run, run, tmp_path) as child:
        child.send_signal(number)
        child.wait(timeout=90)
    assert child.returncode == 128 + number
    receipt = load(run, "receipt.json")
    assert (receipt["status"], receipt["reason"]) == ("incomplete", f"ended by {number.name}")
    assert receipt["ended"] is not None
    assert receipt["iterations_done"] == receipt["totals"]["iterations"] == len(read_metrics(run / "metrics.jsonl")) > 0
    assert receipt["exit"] == load(run, "exit.json")
    assert load(run, "exit.json")["signal"] == number.name
    assert not processes_of(run)
    assert "Traceback" not in (tmp_path / "log").read_text()  # torchrun's own


def test_ranks_do_not_outlive_a_killed_launcher(short_run, tmp_path):
    run = tmp_path / "run"
    with long_run(short_run, run, tmp_path) as child:
        assert len(ranks_of(run)) >= 2
        child.kill()
        child.wait()
        deadline = time.monotonic() + 60
        while processes_of(run) and time.monotonic() < deadline:
            time.sleep(0.2)
    assert not processes_of(run)
    receipt = load(run, "receipt.json")
    assert (receipt["status"], receipt["ended"], receipt["exit"]) == ("incomplete", None, None)
    done = receipt["iterations_done"]  # as it was at most ten seconds before
    assert 1 <= done == receipt["last"]["iteration"] == receipt["totals"]["iterations"]
    assert done <= len(read_metrics(run / "metrics.jsonl"))
    assert receipt["updated"] > receipt["started"]
    require_run_fits(run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_that_have_just_been_started_do_not_stay(short_run, tmp_path, number):
    """The launcher is interrupted, or torchrun killed, before a rank has asked to be told of that."""
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as output:
        line = command(*short_run, "--run-dir", str(run))
        child = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment())
    try:
        while not ranks_of(run):
            assert child.poll() is None, log.read_text()[-3000:]
        torchrun = [pid for pid, words in processes_of(run).items() if f"-m {AGENT_MODULE}" in words[:200]]
        os.kill(child.pid if number == signal.SIGINT else torchrun[0], number)
        assert child.wait(timeout=90) == (130 if number == signal.SIGINT else 1)
    finally:
        child.kill()
    deadline = time.monotonic() + 30
    while found := processes_of(run):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert load(run, "receipt.json")["status"] == "incomplete"


def test_a_killed_rank_is_told(short_run, tmp_path):
    run = tmp_path / "run"
    with long_run(short_run, run, tmp_path) as child:
        ranks = [pid for pid in ranks_of(run) if AGENT_MODULE not in processes_of(run)[pid]]
        assert len(ranks) == 2
        os.kill(ranks[-1], signal.SIGKILL)
        child.wait(timeout=120)
    assert child.returncode == 1
    receipt = load(run, "receipt.json")
    assert (receipt["status"], receipt["failure_kind"]) == ("incomplete", "crash")
    assert receipt["iterations_done"] == len(read_metrics(run / "metrics.jsonl"))
    assert "/" not in receipt["reason"]
    if (run / "error-0.json").exists():  # else torchrun was quicker than the loss of its peer
        assert receipt["reason"].startswith("rank 1 ended without a word; rank 0: ")
    assert not processes_of(run)


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
