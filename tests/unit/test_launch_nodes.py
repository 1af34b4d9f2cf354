"""A node's launcher while it waits for the others: what a signal leaves, and what it makes of an old offer."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.files import EXIT, read_json, write_json
from megacpp_stp.runs.nodes import Leader, Pace
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.training import follower, launcher
from megacpp_stp.training.launcher import Launch
from megacpp_stp.training.torchrun import Node, Signals, stop_signals

PLAN = build_plan(load_recipe("nam56r-tiny", ("launch.nodes=2", "launch.processes_per_node=1")), device="cpu")


def launch(tmp_path, rank):
    return Launch(plan=PLAN, run_dir=tmp_path / "run", node=Node(rank=rank, endpoint="host:29500", timeout=20))


def tree(path):
    return {found: found.stat().st_mtime_ns for found in path.rglob("*")}


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_on_a_node_that_waits_for_node_0_leaves_nothing(tmp_path, there):
    waiting = launch(tmp_path, 1)
    if there:
        (waiting.run_dir / "nodes").mkdir(parents=True)
    before = tree(tmp_path)
    with stop_signals():  # as a net: the signal may come before the launcher's own
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        assert waiting.run() == 130
        timer.join()
    assert tree(tmp_path) == before


def test_a_node_gives_up_an_offer_that_a_killed_launch_left(tmp_path, monkeypatch):
    """It is killed at the meeting; with --resume on both, node 1 sees its offer before node 0 is so far."""
    monkeypatch.setattr(launcher, "run_torchrun", lambda *words, **more: time.sleep(1) or 0)
    monkeypatch.setattr(Launch, "check", lambda self: None)
    nodes, plan = [launch(tmp_path, rank) for rank in (0, 1)], PLAN.as_dict()
    nodes[0].run_dir.mkdir()
    write_json(nodes[0].run_dir / "plan.json", plan)
    Receipt.create(nodes[0].run_dir, plan_facts(plan))
    left = Leader(nodes[0].run_dir, nodes=2, stopped=lambda: False, pace=Pace())
    left.offer(plan_digest=plan["digest"], rdzv_id="old", from_iteration=0, attempt=1)
    (nodes[0].run_dir / ".launcher.lock").touch()
    statuses = {}
    # Signals are for the main thread; what they do is not at stake here.
    monkeypatch.setattr(launcher, "stop_signals", lambda: nullcontext(Signals()))
    monkeypatch.setattr(follower, "stop_signals", lambda: nullcontext(Signals()))

    def start(rank):
        statuses[rank] = replace(nodes[rank], from_iteration=0).run()

    threads = [threading.Thread(target=start, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    assert statuses[1] == 0
    assert len(read_json(nodes[0].run_dir / "receipt.json")["attempts"]) == 2
    assert read_json(nodes[0].run_dir / EXIT)["other_nodes"]["1"]["status"] == 0
