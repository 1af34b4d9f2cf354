"""Real runs whose numbers are not finite, and real runs that hang; see `tests/e2e/faults`."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megacpp_stp.runs.hangs import read_reports
from megacpp_stp.runs.metrics import read_metrics
from tests.e2e.conftest import command, environment
from tests.e2e.test_broken_runs import load, processes_of, ranks_of
from tests.e2e.test_resume import saved, tensors  # noqa: F401 - `saved` needs it

pytestmark = pytest.mark.slow
LAYOUTS = {"PP2": (), "DP2": ("parallel.pipeline=1", "parallel.stages=[12]")}
SKIP = "training.health={nonfinite: skip, most_skipped: 2, hang_minutes: 10}"
QUICK = "training.health.hang_minutes=0.05"


def started(short_run, run, *overrides, what, rank, iteration=3, times=1):
    """The launcher, and its log."""
    fault = {"what": what, "rank": rank, "iteration": iteration, "times": times}
    path = os.pathsep.join([str(Path(__file__).parent / "faults"), os.environ.get("PYTHONPATH", "")])
    variables = {**environment(), "TEST_FAULT": json.dumps(fault), "PYTHONPATH": path}
    settings = (token for item in overrides for token in ("--set", item))
    log = run.with_suffix(".log")
    with log.open("w") as output:
        line = command(*short_run, *settings, "--run-dir", str(run))
        return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=variables), log


def finished(short_run, run, *overrides, **fault):
    """Exit status and output."""
    child, log = started(short_run, run, *overrides, **fault)
    try:
        return child.wait(timeout=400), log.read_text()
    finally:
        child.kill()


STOPS = {
    "gradient": (0, "rank 0: iteration 3: gradient is not finite on pipeline stage 0: "),
    "lm_loss": (1, "rank 1: iteration 3: lm loss of microbatch 1 is nan"),
    "stp_loss": (1, "rank 1: iteration 3: STP loss after layer 12 is not finite"),
}


@pytest.mark.parametrize("what", STOPS)
def test_a_number_that_is_not_finite_ends_the_run_with_its_place(short_run, tmp_path, what):
    rank, words = STOPS[what]
    status, said = finished(short_run, tmp_path / "run", what=what, rank=rank)
    receipt = load(tmp_path / "run", "receipt.json")
    assert (status, receipt["failure_kind"], receipt["iterations_done"]) == (1, "nonfinite", 2)
    assert receipt["reason"].startswith(words)
    assert f"rank {rank} failed first: {words.removeprefix(f'rank {rank}: ')}" in said
    assert load(tmp_path / "run", f"error-{rank}.json")["cause"] == what


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_as_if_the_step_had_never_been(short_run, tmp_path, layout):
    """The truth has no number that is not finite: Megatron's optimizer and balancing refuse the step themselves."""
    what = "gradient" if layout == "PP2" else "lm_loss"
    skipped, truth = tmp_path / "skipped", tmp_path / "truth"
    status, said = finished(short_run, skipped, SKIP, *LAYOUTS[layout], what=what, rank=0 if layout == "PP2" else 1)
    assert status == 0, said[-3000:]
    assert "iteration 3 is skipped: rank " in said
    status, said = finished(short_run, truth, *LAYOUTS[layout], what="no step", rank=None)
    assert status == 0, said[-3000:]
    mine, theirs = saved(skipped, 6), saved(truth, 6)
    assert mine.keys() == theirs.keys()
    assert [name for name, value in mine.items() if not value.equal(theirs[name])] == []
    records = read_metrics(skipped / "metrics.jsonl")
    assert [record["nonfinite"] for record in records] == [None, None, what, None, None, None]
    assert [record["skipped"] for record in records] == [False, False, True, False, False, False]
    assert (records[2]["lm_loss"], records[2]["bits_per_byte"], records[2]["stp_loss"]) == (None, None, None)
    assert (records[-1]["skipped_iterations"], records[-1]["nonfinite_iterations"]) == (1, 1)
    compared = ("lm_loss", "grad_norm", "learning_rate", "stp_loss")
    for record, other in zip(records, read_metrics(truth / "metrics.jsonl"), strict=True):
        assert record["iteration"] == 3 or all(record[name] == other[name] for name in compared)


def test_too_many_in_a_row_end_the_run(short_run, tmp_path):
    status, _ = finished(short_run, tmp_path / "run", SKIP, what="lm_loss", rank=1, iteration=2, times=9)
    receipt = load(tmp_path / "run", "receipt.json")
    assert (status, receipt["failure_kind"], receipt["iterations_done"]) == (1, "nonfinite", 3)
    assert receipt["reason"] == (
        "iteration 4: rank 1: lm loss of microbatch 1 is not finite; "
        "2 steps in a row were skipped for such numbers before it"
    )


HANGS = {
    "sleep": "rank 1 stopped in data of iteration 3 at next_batch (sitecustomize.py:",
    "keep the interpreter": "rank 1 said nothing: the interpreter of rank 1 is blocked (hang-1.txt)",
}


@pytest.mark.parametrize("what", HANGS)
def test_a_run_that_hangs_ends_and_says_who_waits_where(short_run, tmp_path, what):
    run = tmp_path / "run"
    status, said = finished(short_run, run, QUICK, what=what, rank=1)
    receipt = load(run, "receipt.json")
    assert (status, receipt["failure_kind"], receipt["iterations_done"]) == (1, "hang", 2)
    assert HANGS[what] in receipt["reason"]
    assert "; rank 0 waits in " in receipt["reason"] and "(backward of iteration 3)" in receipt["reason"]
    assert "the run hung: no progress for 3 s: rank 1 " in said
    assert "next_batch" in (run / "hang-1.txt").read_text()
    assert load(run, "exit.json")["status"] == 1
    assert not processes_of(run)


def test_a_stopped_process_is_told_by_the_others(short_run, tmp_path):
    run = tmp_path / "run"
    child, log = started(short_run, run, QUICK, "training.iterations=100000", what="nothing", rank=1)
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        stopped = next(pid for pid in ranks_of(run) if rank_of(pid) == 1)
        os.kill(stopped, signal.SIGSTOP)
        assert child.wait(timeout=200) == 1
    finally:
        child.kill()
    reason = load(run, "receipt.json")["reason"]
    assert "rank 1 said nothing: its process is stopped or gone; rank 0 waits in " in reason
    assert [report.rank for report in read_reports(run)] == [0]
    assert not (run / "hang-1.txt").exists()
    assert not processes_of(run)


@pytest.mark.parametrize("layout", ["PP2", "one rank"])
def test_a_suspended_run_goes_on(short_run, tmp_path, layout):
    """All of its processes, as a scheduler or a laptop does it, for longer than they may be without progress."""
    run = tmp_path / "run"
    one = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1") if layout != "PP2" else ()
    settings = ("training.health.hang_minutes=0.1", "training.iterations=40", *one)
    child, log = started(short_run, run, *settings, what="tell the limit", rank=None)
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        stopped = [child.pid, *descendants(child.pid)]
        sentinels = [pid for pid in stopped if b"sentinel.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(sentinels) == (1 if one else 2)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        done = len(read_metrics(run / "metrics.jsonl"))
        time.sleep(20)
        assert len(read_metrics(run / "metrics.jsonl")) == done < 40
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
        assert child.wait(timeout=200) == 0, log.read_text()[-3000:]
    finally:
        child.kill()
    assert load(run, "receipt.json")["status"] == "complete"
    assert [record["iteration"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 41))
    assert "torch waits for 7 days" in log.read_text()  # in its own time, which a suspension does not stop
    assert not list(run.glob("hang*")) and not processes_of(run)


def descendants(pid):
    """Numbers of all processes below one."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(below for child in found for below in descendants(child))]


def rank_of(pid):
    """Of a process; None for torchrun, which has no rank."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [variable.removeprefix(b"RANK=") for variable in variables if variable.startswith(b"RANK=")]
    return int(found[0]) if found else None
