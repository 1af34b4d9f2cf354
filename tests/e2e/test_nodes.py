"""Two launchers on this machine that are two nodes of one run, meeting in its directory."""

import json
import signal
import socket
import subprocess
import time

import pytest

from megacpp_stp.runs.metrics import read_metrics
from tests.e2e.conftest import SHORT, command, environment
from tests.e2e.test_resume import assert_same_run, load, processes_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# A run that can be compared with one that went on: as in test_resume.
SETTINGS = (*SHORT, "training.iterations=8", "training.checkpoint.interval=4", "optimizer.distributed=false")
ONE_RANK = "launch.processes_per_node=1"


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Cluster:
    """Two launchers and their output."""

    def __init__(self, dataset, tmp_path):
        self.run = tmp_path / "run"
        self._logs = tmp_path
        self._settings = (*SETTINGS, ONE_RANK, f"data.path={dataset}")
        self._nodes = {}
        self.port = free_port()

    def start(self, rank, *more, recipe=True):
        """The launcher of one node."""
        sets = (token for item in self._settings for token in ("--set", item)) if recipe else ()
        place = ("--run-dir", self.run, "--node-rank", rank, "--rdzv-endpoint", f"localhost:{self.port}")
        words = ("launch", *(("nam56r-tiny", "--device", "cpu", "--nnodes", 2) if recipe else ()), *sets, *place, *more)
        with (self._logs / f"log-{rank}").open("a") as output:
            self._nodes[rank] = subprocess.Popen(
                command(*map(str, words)), stdout=output, stderr=subprocess.STDOUT, env=environment()
            )
        return self._nodes[rank]

    def says(self, rank):
        return (self._logs / f"log-{rank}").read_text()

    def statuses(self, timeout=400):
        """Of both, once they have ended, and nothing of the run is left."""
        deadline = time.monotonic() + timeout
        found = tuple(self._nodes[rank].wait(timeout=deadline - time.monotonic()) for rank in (0, 1))
        while processes_of(self.run):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return found

    def wait_for_records(self, count):
        deadline = time.monotonic() + 400
        path = self.run / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert all(child.poll() is None for child in self._nodes.values()), (
                self.says(0)[-2000:] + self.says(1)[-2000:]
            )
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self):
        for child in self._nodes.values():
            child.kill()


@pytest.fixture
def cluster(dataset, tmp_path):
    cluster = Cluster(dataset, tmp_path)
    yield cluster
    cluster.stop()


def test_two_nodes_are_one_node_with_two_processes(cli, dataset, cluster, tmp_path):
    """Bit for bit: metrics, validation losses, and every tensor of the last checkpoint."""
    whole = tmp_path / "whole"
    sets = (token for item in (*SETTINGS, f"data.path={dataset}") for token in ("--set", item))
    done = cli("launch", "nam56r-tiny", "--device", "cpu", *sets, "--run-dir", str(whole), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    cluster.start(1)  # the other may come first
    cluster.start(0)
    assert cluster.statuses() == (0, 0), cluster.says(0)[-3000:] + cluster.says(1)[-3000:]
    assert_same_run(cluster.run, whole, iterations=8)
    assert load(cluster.run, "receipt.json")["status"] == "complete"
    assert load(cluster.run, "exit.json")["other_nodes"]["1"]["status"] == 0
    # What rank 0 says and what Megatron's last rank logs can both be read on a terminal, and lie in files; ranks are
    # where --node-rank says, whichever node was first.
    first, second = cluster.says(0), cluster.says(1)
    assert "[rank 0] " in first and "[rank 1] " in second and "| lm loss:" in second
    assert "[rank 1] " not in first and "[rank 0] " not in second
    (folder,) = (cluster.run / "logs" / "attempt-1" / "node-1").glob("*/attempt_0/0")
    assert "| lm loss:" in (folder / "stdout.log").read_text()


def test_a_killed_node_ends_the_run_which_goes_on_on_both(cli, dataset, cluster, tmp_path):
    cluster.start(0, "--set", "training.iterations=1000")
    node = cluster.start(1, "--set", "training.iterations=1000")
    cluster.wait_for_records(5)
    node.kill()
    assert cluster.statuses() == (1, -signal.SIGKILL)
    receipt = load(cluster.run, "receipt.json")
    assert (receipt["status"], receipt["failure_kind"]) == ("incomplete", "crash")
    assert "node 1 went silent" in receipt["reason"]
    assert load(cluster.run, "exit.json")["other_nodes"]["1"]["status"] is None
    assert receipt["attempts"][0]["exit_status"] == 1

    shorter = ("--resume", "--allow-plan-change", "--set", "training.iterations=12")
    for rank in (0, 1):
        cluster.start(rank, *shorter, recipe=False)
    assert cluster.statuses() == (0, 0), cluster.says(0)[-3000:] + cluster.says(1)[-3000:]
    receipt = load(cluster.run, "receipt.json")
    assert receipt["status"] == "complete"
    assert receipt["attempts"][1]["from_iteration"] >= 4
    assert [record["iteration"] for record in read_metrics(cluster.run / "metrics.jsonl")] == list(range(1, 13))
    assert (cluster.run / "logs" / "attempt-2" / "node-1").is_dir()

    for rank in (0, 1):
        cluster.start(rank, "--resume", recipe=False)
    assert cluster.statuses() == (0, 0)
    assert "nothing to do" in cluster.says(0) and "nothing to do" in cluster.says(1)


def test_a_launch_that_was_killed_at_once_begins_on_both(cluster):
    """As Slurm requeues it: the same command on both nodes, with --resume, where there is no receipt yet."""
    cluster.run.mkdir()
    (cluster.run / ".launcher.lock").touch()
    for rank in (1, 0):
        cluster.start(rank, "--resume")
    assert cluster.statuses() == (0, 0), cluster.says(0)[-3000:] + cluster.says(1)[-3000:]
    assert "begins there from iteration 0" in cluster.says(0)
    receipt = load(cluster.run, "receipt.json")
    assert (receipt["status"], len(receipt["attempts"])) == ("complete", 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_any_node_ends_all_ranks(cluster, rank):
    cluster.start(0, "--set", "training.iterations=1000")
    cluster.start(1, "--set", "training.iterations=1000")
    cluster.wait_for_records(1)
    cluster._nodes[rank].send_signal(signal.SIGTERM)
    assert cluster.statuses() == (143, 143)
    receipt = load(cluster.run, "receipt.json")
    assert receipt["status"] == "incomplete"
    assert receipt["reason"] == f"ended by SIGTERM on node {rank} of 2"
    assert load(cluster.run, "exit.json")["signal"] == "SIGTERM"


def test_another_plan_on_a_node_is_refused_on_both(cluster):
    cluster.start(0)
    cluster.start(1, "--set", "training.seed=7")
    assert cluster.statuses() == (2, 2)
    assert "training.seed: 1234 on node 0, 7 here" in cluster.says(1)
    assert "node 1 refused: node 1 has another plan" in cluster.says(0)
    receipt = load(cluster.run, "receipt.json")
    assert (receipt["status"], receipt["failure_kind"]) == ("incomplete", "user")
    assert load(cluster.run, "exit.json")["status"] == 2
    assert json.loads((cluster.run / "nodes" / "0.json").read_text())["state"] == "refused"


def test_an_old_directory_is_not_taken(cluster):
    """Node 1 alone, in the directory of a run that ended: it waits, writes nothing there, and gives up."""
    cluster.start(0, "--node-timeout", 1)
    cluster._nodes[1] = cluster._nodes[0]
    assert cluster.statuses() == (2, 2)
    before = {path: path.read_bytes() for path in cluster.run.rglob("*") if path.is_file()}
    cluster.start(1, "--node-timeout", 3)
    assert cluster._nodes[1].wait(timeout=60) == 2
    assert "did not offer the run" in cluster.says(1)
    assert before == {path: path.read_bytes() for path in cluster.run.rglob("*") if path.is_file()}
