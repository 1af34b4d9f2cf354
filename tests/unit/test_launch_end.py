"""How a run ended, and what the launcher says of it."""

import os
import signal
import time
from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.env import RANKS_END_S
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.failures import first_failure, report_failure, text_of
from megacpp_stp.runs.files import EXIT, PLAN, read_json, write_json
from megacpp_stp.runs.nodes import Pace, PeerEnd
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.training.closing import Outcome, close_run
from megacpp_stp.training.last_words import last_words
from megacpp_stp.training.torchrun import LOOK_S


@pytest.fixture
def directory(tmp_path):
    Receipt.create(tmp_path, plan_facts(build_plan(load_recipe("nam56r-tiny"), device="cpu").as_dict()))
    return tmp_path


SILENT, TERMED = PeerEnd(node=1, status=None), PeerEnd(node=2, status=143, signal=15)


@pytest.mark.parametrize(
    ("outcome", "error", "status", "reason"),
    [
        (Outcome(torchrun=1), None, 1, "torchrun ended with status 1 and no rank said why"),
        (Outcome(torchrun=0), None, 1, "torchrun ended with status 0 and no rank said why"),
        (Outcome(torchrun=1), UserError("is bad", field="it"), 2, "rank 3: it: is bad"),
        (Outcome(torchrun=0), SystemExit(0), 1, f"rank 3: {text_of(SystemExit(0))}"),
        (Outcome(torchrun=1), SystemExit(3), 1, "rank 3: SystemExit: 3"),
        (Outcome(torchrun=1), RuntimeError("boom"), 1, "rank 3: RuntimeError: boom"),
        (
            Outcome(torchrun=1, others={1: SILENT}),
            RuntimeError("boom"),
            1,
            "rank 3: RuntimeError: boom; node 1 went silent",
        ),
        (Outcome(torchrun=1, ended_by=SILENT), None, 1, "node 1 went silent, and no rank said why"),
        (Outcome(torchrun=1, signal=2), RuntimeError("boom"), 130, "ended by SIGINT"),
        (Outcome(signal=15), None, 143, "ended by SIGTERM"),
        (
            Outcome(torchrun=1, ended_by=TERMED, others={1: SILENT, 2: TERMED}),
            None,
            143,
            "ended by SIGTERM on node 2 of 3",
        ),
        (Outcome(torchrun=1, others={2: TERMED}), RuntimeError("boom"), 143, "ended by SIGTERM on node 2 of 2"),
    ],
)
def test_how_a_run_ended_is_told_once(directory, outcome, error, status, reason):
    if error is not None:
        report_failure(directory, rank=3, error=error)
    assert close_run(directory, outcome) == status
    receipt = read_json(directory / "receipt.json")
    assert (receipt["status"], receipt["reason"]) == ("incomplete", reason)
    assert receipt["attempts"][-1]["exit_status"] == status
    told = read_json(directory / EXIT)
    assert told["status"] == status
    assert told["signal"] == (signal.Signals(status - 128).name if status > 128 else None)
    assert told.get("other_nodes", {}).keys() == {str(node) for node in outcome.others}


def test_a_run_is_closed_before_the_other_nodes_have_ended(directory):
    """And once more after that; what they keep open until then stays."""
    stacks = directory / "hang-1.txt"
    stacks.touch()
    outcome = Outcome(torchrun=1, signal=15)
    assert close_run(directory, outcome, last=False) == 143
    assert stacks.exists()
    assert read_json(directory / "receipt.json")["reason"] == "ended by SIGTERM"
    assert read_json(directory / EXIT)["signal"] == "SIGTERM"
    assert close_run(directory, replace(outcome, others={1: SILENT})) == 143
    assert not stacks.exists()
    receipt = read_json(directory / "receipt.json")
    assert (receipt["reason"], len(receipt["attempts"])) == ("ended by SIGTERM on node 0 of 2", 1)
    assert receipt["exit"]["other_nodes"]["1"]["status"] is None


def test_nodes_wait_for_each_other_longer_than_their_ranks_may_take_to_end():
    """Ranks get the time twice: after SIGTERM, and after SIGKILL (torch's multiprocessing/api.py)."""
    pace = Pace()
    assert pace.end > pace.look + LOOK_S + 2 * RANKS_END_S
    assert pace.dead > 2 * RANKS_END_S  # no sign of life meanwhile
    assert pace.end > 30 + pace.look + LOOK_S  # torch 2.11, whose time is fixed
    assert RANKS_END_S < 30  # Slurm's KillWait


def test_a_run_that_completed_ends_well(directory):
    Receipt(directory).complete(iterations_done=1)
    assert close_run(directory, Outcome(torchrun=0, others={1: PeerEnd(node=1, status=0)})) == 0
    assert read_json(directory / "receipt.json")["reason"] is None


def test_the_first_failing_rank_has_the_last_word(directory, monkeypatch):
    folder = directory / "logs" / "attempt-1" / "node-1" / "id" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text("early\n" + "\n" * 9 + "x\n" * 11 + "RuntimeError: \x1b[31mboom\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    report_failure(directory, rank=3, error=RuntimeError("boom"))
    time.sleep(0.01)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    report_failure(directory, rank=0, error=RuntimeError("connection closed"))
    lines = list(last_words(directory, logs=directory / "logs"))
    assert lines[0] == "rank 3 failed first: RuntimeError: boom"
    assert lines[1] == f"its output is in {folder}, and ends:"
    assert len(lines) == 14
    assert "early" not in "".join(lines)
    assert "\x1b" not in lines[-1] and "boom" in lines[-1]
    assert first_failure(directory)["logs"] == str(folder.relative_to(directory))


@pytest.mark.parametrize(
    "said",
    [
        "[pair.cc:561] Connection closed by peer [127.0.0.1]:11183. This is typically caused by",
        "[pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_was_killed_is_told_before_what_lost_it(directory, said):
    """It has no last word, and the others' are not why the run ended."""
    write_json(directory / PLAN, {"world_size": 4})
    for rank in (0, 3):
        report_failure(directory, rank=rank, error=RuntimeError(said))
    assert first_failure(directory)["text"] == f"ranks 1, 2 ended without a word; rank 0: RuntimeError: {said}"
    first, second, *_ = last_words(directory, logs=directory / "logs")
    assert first.startswith("ranks 1, 2 ended without a word: killed from outside")
    assert second.startswith("rank 0 lost its peer: RuntimeError: ")
    report_failure(directory, rank=1, error=RuntimeError("boom"))
    assert first_failure(directory)["silent"] == [2]
    for rank in (1, 2):
        report_failure(directory, rank=rank, error=RuntimeError(said))
    assert first_failure(directory)["text"].startswith("rank 0: ")  # nobody is silent


def test_a_rank_with_an_error_of_its_own_is_not_put_behind_those_that_it_took_along(directory):
    write_json(directory / PLAN, {"world_size": 4})
    report_failure(directory, rank=3, error=RuntimeError("boom"))
    assert first_failure(directory)["text"] == "rank 3: RuntimeError: boom"


def test_an_exit_that_was_asked_for_is_no_failure(directory):
    report_failure(directory, rank=3, error=SystemExit(0))
    (line,) = last_words(directory, logs=directory / "logs")
    assert line.startswith("Megatron ended the run early, as exit-duration-in-mins")
    assert first_failure(directory)["kind"] == "asked"


def test_no_word_is_told_too(directory):
    assert list(last_words(directory, logs=directory / "logs")) == [
        f"no rank said why; their output is in {directory / 'logs'}"
    ]
