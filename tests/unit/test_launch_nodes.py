"""A node's launcher while it waits for the others: what a signal leaves, and what it makes of an old offer."""

import os
import signal
import socket
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.failures import report_failure
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


def test_node_0_refuses_an_endpoint_whose_port_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(Launch, "check", lambda self: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        node = Node(rank=0, endpoint=f"localhost:{other.getsockname()[1]}")
        with pytest.raises(UserError, match="in use") as caught:
            replace(launch(tmp_path, 0), node=node).preflight()
        assert caught.value.field == "--rdzv-endpoint"
        replace(launch(tmp_path, 1), node=replace(node, rank=1)).preflight()  # the port is node 0's
    replace(launch(tmp_path, 0), node=node).preflight()


@pytest.fixture
def together(tmp_path, monkeypatch):
    """Start both launchers, node 1 first, without their ranks; the status of each."""
    monkeypatch.setattr(Launch, "check", lambda self: None)
    # Signals are for the main thread; what they do is not at stake here.
    monkeypatch.setattr(launcher, "stop_signals", lambda: nullcontext(Signals()))
    monkeypatch.setattr(follower, "stop_signals", lambda: nullcontext(Signals()))

    def start(torchrun, **more):
        monkeypatch.setattr(launcher, "run_torchrun", torchrun)
        statuses = {}

        def one(rank):
            statuses[rank] = replace(launch(tmp_path, rank), **more).run()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()
        return statuses

    return start


def test_a_mistake_that_can_be_mended_is_told_by_the_status_of_all_nodes(tmp_path, together):
    def torchrun(*words, **more):
        time.sleep(0.5)
        report_failure(tmp_path / "run", rank=1, error=UserError("is bad", field="it"))
        return -signal.SIGKILL

    assert together(torchrun) == {0: 2, 1: 2}
    for rank in (0, 1):  # of processes that ended, not of a signal that came
        ended = read_json(tmp_path / "run" / "nodes" / f"{rank}.json")
        assert (ended["state"], ended["status"], ended["signal"]) == ("ended", 1, None)


def test_a_signal_while_node_0_waits_for_the_others_is_told_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "stop_signals", lambda: nullcontext(Signals(caught=signal.SIGTERM)))
    assert launch(tmp_path, 0).run() == 143
    ended = read_json(tmp_path / "run" / "nodes" / "0.json")
    assert (ended["state"], ended["status"], ended["signal"]) == ("ended", 143, signal.SIGTERM)
    assert read_json(tmp_path / "run" / "receipt.json")["reason"] == "ended by SIGTERM"


def test_a_node_gives_up_an_offer_that_a_killed_launch_left(tmp_path, together):
    """It is killed at the meeting; with --resume on both, node 1 sees its offer before node 0 is so far."""
    run, plan = tmp_path / "run", PLAN.as_dict()
    run.mkdir()
    write_json(run / "plan.json", plan)
    Receipt.create(run, plan_facts(plan))
    left = Leader(run, nodes=2, stopped=lambda: False, pace=Pace())
    left.offer(plan_digest=plan["digest"], rdzv_id="old", from_iteration=0, attempt=1)
    statuses = together(lambda *words, **more: time.sleep(0.5) or 0, from_iteration=0)
    assert statuses[1] == 0
    assert len(read_json(run / "receipt.json")["attempts"]) == 2
    assert read_json(run / EXIT)["other_nodes"]["1"]["status"] == 0
