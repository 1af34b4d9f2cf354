"""Real ranks compare themselves before they train: one that differs stops the run, and is named by all."""

import json
import os
import socket
import subprocess

import pytest

from tests.e2e.conftest import command, environment

# In each process of the launch before anything else; only one rank sees another torch.
ODD = """
import importlib.metadata as metadata, os
real = metadata.version
if os.environ.get("RANK") == "1" and "MASTER_ADDR" in os.environ:
    metadata.version = lambda name: "2.11.0" if name == "torch" else real(name)
"""


def load(directory, name):
    return json.loads((directory / name).read_text())


@pytest.mark.slow
def test_a_rank_of_another_torch_stops_the_run_on_every_rank(short_run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ODD)
    run = tmp_path / "run"
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = subprocess.run(
        command(*short_run, "--run-dir", str(run)), capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout + done.stderr
    difference = f"rank 1 on node {socket.gethostname()} has torch 2.11.0, rank 0 has "
    for rank in (0, 1):
        assert f"megacpp-stp: rank {rank}: ranks: {difference}" in said
    receipt = load(run, "receipt.json")
    assert (receipt["status"], receipt["failure_kind"], receipt["iterations_done"]) == ("incomplete", "user", 0)
    assert "ranks: rank 1 on node (a host) has torch 2.11.0" in receipt["reason"]
    assert socket.gethostname() not in json.dumps(receipt)
    assert not (run / "metrics.jsonl").exists()


def test_a_run_says_where_its_ranks_were(run):
    receipt, ranks = load(run[0], "receipt.json"), load(run[0], "ranks.json")
    assert receipt["placement"] == {"nodes": [{"ranks": [0, 1], "devices": ["cpu", "cpu"], "clock_skew_s": 0.0}]}
    assert ranks.keys() == {"0", "1"}
    assert ranks["0"]["same"] == ranks["1"]["same"]
    assert ranks["1"]["same"]["plan"] == receipt["plan_digest"]
    assert ranks["1"]["same"]["patches"] == receipt["patches_digest"]
    assert (ranks["0"]["node"], ranks["1"]["local_rank"]) == (socket.gethostname(), 1)
