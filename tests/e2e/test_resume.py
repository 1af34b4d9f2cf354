"""A run that is killed and goes on is the run that was never killed, bit for bit."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megacpp_stp.runs.metrics import read_metrics
from tests.e2e.conftest import SHORT, command, environment
from tests.unit.test_runs_schema import require_run_fits

OF_THE_MACHINE = ("step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "goodput", "peak_memory_bytes")
# A checkpoint on each side of the gate, which opens where the run is stopped; one more evaluation than checkpoints.
SETTINGS = (
    *SHORT,
    "training.iterations=12",
    "training.eval_interval=2",
    "training.checkpoint.interval=4",
    "stp.start_step=6",
    "stp.ramp_steps=4",  # the kill lies inside
)


def load(directory, name):
    return json.loads((directory / name).read_text())


def arguments(dataset, *more):
    settings = (*SETTINGS, f"data.path={dataset}", *more)
    return ["launch", "nam56r-tiny", "--device", "cpu", *(token for item in settings for token in ("--set", item))]


def processes_of(run):
    """Numbers and command lines of the processes that name the run directory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end while we look
            words = path.read_bytes().split(b"\0")
            if any(str(run).encode() in word for word in words):
                found[int(path.parent.name)] = words
    return found


def ranks_of(run):
    found = processes_of(run).items()
    return sorted(pid for pid, words in found if words[1:4] == [b"-u", b"-m", b"megacpp_stp.training.entry"])


def stop(run, launch, when, victims):
    """Start, and kill one process without warning once `when` is true; the launcher's status, and whether it was."""
    with (run.parent / "log").open("a") as output:
        child = subprocess.Popen(command(*launch), stdout=output, stderr=subprocess.STDOUT, env=environment())
    try:
        deadline = time.monotonic() + 400
        while child.poll() is None and not when():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        found = victims(child) if child.poll() is None else []
        for pid in found[:1]:
            os.kill(pid, signal.SIGKILL)
        status = child.wait(timeout=300)
        while processes_of(run):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return status, bool(found)
    finally:
        child.kill()


def records(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def without_times(run):
    """Lines as they are on disk, byte for byte, but for what the machine's speed and memory say."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    told = [{key: value for key, value in json.loads(line).items() if key not in OF_THE_MACHINE} for line in lines]
    return [json.dumps(record, sort_keys=True) for record in told]


def saved(run, iteration):
    """All tensors of a checkpoint by name: weights, optimizer, random streams."""
    content = {}
    reader = dcp.FileSystemReader(str(run / "checkpoints" / f"iter_{iteration:07d}"))
    _load_state_dict(content, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(tensors("", content))


def tensors(name, value):
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(f"{name}/{key}", item)


def assert_same_run(run, whole, *, iterations):
    assert without_times(run) == without_times(whole)
    assert [record["iteration"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, iterations + 1))
    assert load(run, "receipt.json")["validation"] == load(whole, "receipt.json")["validation"]
    mine, theirs = load(run, "receipt.json"), load(whole, "receipt.json")
    for name in ("best", "weights_sha256", "collected", "stp_iterations"):
        assert mine[name] is not None and mine[name] == theirs[name], name
    for name in ("iterations", "tokens", "loss_tokens", "skipped_iterations"):
        assert mine["totals"][name] == theirs["totals"][name], name
    require_run_fits(run)
    mine, theirs = saved(run, iterations), saved(whole, iterations)
    assert mine.keys() == theirs.keys()
    for part in ("linear_proj.weight", "exp_avg_sq", "expert_bias", "torch_rng_state", "rng_tracker_states"):
        assert any(part in name for name in mine), part
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []


def run_whole(cli, directory, launch):
    done = cli(*launch, "--run-dir", str(directory), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory


def kill_and_resume(cli, directory, launch, *, after):
    """Killed once `after` records are there, then resumed to the end: the launcher's two words."""
    begin = [*launch, "--run-dir", str(directory)]
    status, killed = stop(directory, begin, lambda: records(directory) >= after, lambda child: ranks_of(directory)[-1:])
    assert (status, killed) == (1, True)
    return cli("launch", "--resume", "--run-dir", str(directory), timeout=600)


def test_a_killed_run_that_goes_on_is_the_whole_run(cli, dataset, tmp_path):
    """Killed around the gate, some iterations after a checkpoint."""
    launch = arguments(dataset)
    whole, run = run_whole(cli, tmp_path / "whole", launch), tmp_path / "run"
    resumed = kill_and_resume(cli, run, launch, after=6)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "goes on from iteration 4" in resumed.stdout
    assert_same_run(run, whole, iterations=12)

    receipt = load(run, "receipt.json")
    first, second = receipt["attempts"]
    assert (receipt["status"], receipt["iterations_done"]) == ("complete", 12)
    assert (first["from_iteration"], first["status"], first["exit_status"]) == (0, "incomplete", 1)
    assert (second["from_iteration"], second["status"], second["exit_status"]) == (4, "complete", 0)
    assert first["iterations_done"] == 4 + len(read_metrics(run / "attempt-1" / "metrics.jsonl")) >= 6
    assert load(run, "attempt-1/receipt.json")["status"] == "incomplete"
    assert load(run, "attempt-1/exit.json")["status"] == 1
    assert load(run, "plan.json") == load(whole, "plan.json")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = cli("launch", "--resume", "--run-dir", str(run))
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    other = cli(*launch, "--set", "training.seed=7", "--resume", "--allow-plan-change", "--run-dir", str(run))
    assert other.returncode == 2
    assert "training.seed: 1234 in the run, 7 here" in other.stderr
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_launcher_killed_as_soon_as_its_directory_is_there_goes_on(cli, dataset, tmp_path):
    """Before its receipt or just after: nothing says when the kill comes."""
    launch, run = arguments(dataset), tmp_path / "run"
    begin = [*launch, "--run-dir", str(run)]
    status, killed = stop(run, begin, run.exists, lambda child: [child.pid])
    assert (status, killed) == (-signal.SIGKILL, True)
    again = cli(*begin)
    assert (again.returncode, "--resume" in again.stderr) == (2, True)
    resumed = cli(*begin, "--resume", timeout=600)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "begins" in resumed.stdout
    assert (load(run, "receipt.json")["status"], records(run)) == ("complete", 12)
    assert_same_run(run, run_whole(cli, tmp_path / "whole", launch), iterations=12)


TWO = ("parallel.stages=[12]", "parallel.pipeline=1", "optimizer.distributed=true")
LAYOUTS = {
    "distributed optimizer, bf16": (*TWO, "training.precision=bf16"),
    "distributed optimizer, pipeline": ("optimizer.distributed=true",),
    "tensor and sequence parallel": (*TWO[:2], "parallel.tensor=2", "parallel.sequence_parallel=true"),
    "expert parallel": (*TWO[:2], "parallel.expert=2"),
    "virtual stages": ("parallel.virtual=2", "parallel.stages=[2, 2, 4, 4]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_on_exactly(cli, dataset, tmp_path, layout):
    launch = arguments(dataset, *LAYOUTS[layout])
    whole, run = run_whole(cli, tmp_path / "whole", launch), tmp_path / "run"
    resumed = kill_and_resume(cli, run, launch, after=7)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert_same_run(run, whole, iterations=12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_at_random_change_nothing(cli, dataset, tmp_path):
    """Of any process, launcher and torchrun too; often while a checkpoint is being written."""
    often = "training.checkpoint={interval: 2, keep_every: 10}"
    launch = arguments(dataset, "training.iterations=40", often)
    whole, run = run_whole(cli, tmp_path / "whole", launch), tmp_path / "run"
    chance = random.Random(20261120)
    kills, begin = 0, [*launch, "--run-dir", str(run)]
    while kills < 10:
        there = {path.name for path in run.glob("checkpoints/iter_*")}
        enough, saving = records(run) // 2 * 2 + chance.randint(0, 3), chance.random() < 0.5
        delay = chance.random() * 0.15

        def when(there=there, enough=enough, saving=saving, delay=delay):
            if saving:
                reached = bool({path.name for path in run.glob("checkpoints/iter_*")} - there)
            else:
                reached = bool(ranks_of(run)) and records(run) >= enough
            if reached:
                time.sleep(delay)
            return reached

        def victims(child):
            found = [*ranks_of(run), *ranks_of(run), *processes_of(run)]
            return [chance.choice(found)]

        status, killed = stop(run, begin, when, victims)
        assert killed and status != 0
        kills += 1
        begin = ["launch", "--resume", "--run-dir", str(run)]
    resumed = cli(*begin, timeout=600)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert_same_run(run, whole, iterations=40)
    assert len(load(run, "receipt.json")["attempts"]) == 11


@pytest.mark.slow
def test_a_checkpoint_of_another_plan_is_refused(cli, dataset, tmp_path):
    """Of equal sizes, put there by mistake: only its plan says that it is not the run's."""
    launch = arguments(dataset, "training.iterations=4", "stp.start_step=2", "stp.ramp_steps=0")
    run = run_whole(cli, tmp_path / "run", launch)
    other = run_whole(cli, tmp_path / "other", [*launch, "--set", "training.seed=7"])
    place = "checkpoints/iter_0000004"
    (run / place).rename(tmp_path / "mine")
    (other / place).rename(run / place)
    more = ("--set", "training.iterations=6", "--allow-plan-change")
    done = cli("launch", "--resume", "--run-dir", str(run), *more)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checkpoint: iteration 4 was written by another plan than this run's" in done.stderr
    (run / place).rename(other / place)
    (tmp_path / "mine").rename(run / place)
    done = cli("launch", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert load(run, "receipt.json")["iterations_done"] == 6


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(cli, dataset, tmp_path):
    """With a schedule that does not depend on the length, and data that is read once: as if it had been so long."""
    evaluation = ("training.eval_interval=100", "training.eval_iterations=0")
    constant = ("optimizer.decay=constant", *evaluation, "stp.ramp_steps=2")  # the weight is reached in either
    whole = run_whole(cli, tmp_path / "whole", arguments(dataset, *constant))
    run = run_whole(cli, tmp_path / "run", arguments(dataset, *constant, "training.iterations=8"))
    longer = ("launch", "--resume", "--run-dir", str(run), "--set", "training.iterations=12")
    refused = cli(*longer)
    assert refused.returncode == 2
    assert "training.iterations: 8 in the run, 12 here" in refused.stderr
    resumed = cli(*longer, "--allow-plan-change")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert without_times(run) == without_times(whole)
    assert load(run, "attempt-1/plan.json")["recipe"]["training"]["iterations"] == 8
    assert load(run, "plan.json")["recipe"]["training"]["iterations"] == 12
    assert load(run, "receipt.json")["iterations_planned"] == 12
