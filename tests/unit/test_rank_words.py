"""What several ranks say of a run that ended, and the stacks of those that hang."""

import itertools
import sys
from types import SimpleNamespace

import pytest

from megacpp_stp.runs.failures import first_failure, report_failure
from megacpp_stp.runs.hangs import HangReport, hang_text, ranks_text, write_report
from megacpp_stp.training.finite import NonFinite
from megacpp_stp.training.health import coordinates
from megacpp_stp.training.stacks import collective_of, position
from megacpp_stp.training.watchdog import Hang


def test_of_several_ranks_the_cause_is_told(tmp_path):
    """Not what followed from it, though that was written first."""
    report_failure(tmp_path, rank=2, error=NonFinite("iteration 5: gradient is not finite", cause="gradient"))
    report_failure(tmp_path, rank=3, error=NonFinite("iteration 5: lm loss is nan", cause="lm_loss"))
    report_failure(tmp_path, rank=0, error=RuntimeError("Connection closed by peer"))
    found = first_failure(tmp_path)
    assert (found["kind"], found["rank"]) == ("nonfinite", 3)
    assert found["text"] == "rank 3: iteration 5: lm loss is nan; rank 2 too"


def test_what_all_ranks_agreed_on_is_told_once(tmp_path):
    text = "iteration 5: rank 1: lm loss of microbatch 1 is not finite; 2 steps in a row were skipped"
    for rank in (0, 1):
        report_failure(tmp_path, rank=rank, error=NonFinite(text, cause="lm_loss", agreed=True))
    assert first_failure(tmp_path)["text"] == text


def test_a_crash_that_came_first_stays_first(tmp_path):
    report_failure(tmp_path, rank=0, error=ValueError("x"))
    report_failure(tmp_path, rank=1, error=NonFinite("y", cause="gradient"))
    assert first_failure(tmp_path)["text"] == "rank 0: ValueError: x"


def reported(directory, **ranks):
    """Reports of ranks, as ``rank_2=("data", 7, None)``: phase, iteration, collective."""
    for name, (phase, iteration, collective) in ranks.items():
        report = HangReport(
            rank=int(name.removeprefix("rank_")),
            world_size=4,
            place={},
            phase=phase,
            iteration=iteration,
            microbatch=None,
            seconds=612.4,
            collective=collective,
            where="next_batch (data.py:40)",
            frames=(),
        )
        write_report(directory, report)


WAITS = ("backward", 7, "all_reduce")
SAID = {
    "one is elsewhere": (
        {"rank_0": WAITS, "rank_1": ("data", 7, None), "rank_2": WAITS, "rank_3": WAITS},
        "rank 1 stopped in data of iteration 7 at next_batch (data.py:40); "
        "ranks 0, 2, 3 wait in all_reduce (backward of iteration 7)",
    ),
    "one is silent": (
        {"rank_0": WAITS, "rank_1": WAITS, "rank_2": WAITS},
        "rank 3 said nothing: its process is stopped or gone; ranks 0-2 wait in all_reduce (backward of iteration 7)",
    ),
    "one waits for something else": (
        {"rank_0": WAITS, "rank_1": WAITS, "rank_2": ("optimizer", 6, "all_gather"), "rank_3": WAITS},
        "rank 2 waits in all_gather (optimizer of iteration 6); "
        "ranks 0, 1, 3 wait in all_reduce (backward of iteration 7)",
    ),
    "all wait for the same": (
        {f"rank_{rank}": WAITS for rank in range(4)},
        "ranks 0-3 wait in all_reduce (backward of iteration 7); no rank differs",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_who_differs_from_the_rest_is_told_first(tmp_path, case):
    ranks, text = SAID[case]
    reported(tmp_path, **ranks)
    report_failure(tmp_path, rank=0, error=Hang("stopped"))
    assert hang_text(tmp_path) == first_failure(tmp_path)["text"] == f"no progress for 612 s: {text}"


def test_a_report_that_was_cut_off_is_left_out(tmp_path):
    reported(tmp_path, rank_0=WAITS)
    (tmp_path / "hang-1.json").write_text('{"rank": 1')
    (tmp_path / "hang-2.json").write_text('{"rank": 2}')
    assert "ranks 1-3 said nothing" in hang_text(tmp_path)
    assert hang_text(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([1, 0], "ranks 0, 1"), ([0, 1, 2, 7], "ranks 0-2, 7"), (range(512), "ranks 0-511")],
)
def test_ranks_in_words(ranks, text):
    assert ranks_text(ranks) == text


# --- stacks ---

C10D, P2P = "torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py"
LOGGER = "torch/distributed/c10d_logger.py"
OURS = "megacpp_stp/training/recorder.py"


@pytest.mark.parametrize(
    ("stack", "collective"),
    [
        ([(C10D, "all_reduce"), (LOGGER, "wrapper"), (OURS, "_mean_over_ranks")], "all_reduce"),
        (
            [(C10D, "all_gather"), (C10D, "all_gather_object"), (LOGGER, "wrapper"), (OURS, "gather")],
            "all_gather_object",
        ),
        ([(P2P, "_communicate"), (P2P, "recv_forward"), ("megatron/core/schedules.py", "f")], "recv_forward"),
        ([(C10D, "wait"), ("megatron/core/buffer.py", "finish_grad_sync"), (OURS, "f")], "finish_grad_sync"),
        ([(OURS, "next_batch"), (C10D, "all_reduce")], None),
        ([("torch/_tensor.py", "item"), (OURS, "loss")], None),
        ([], None),
    ],
)
def test_the_collective_that_a_stack_waits_in(stack, collective):
    lines = itertools.count(1)
    assert collective_of([(name, function, next(lines)) for name, function in stack]) == collective


def test_a_position_of_this_very_test():
    """From a thread, as the watchdog asks: this one waits for it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(position).result()
    assert found.collective is None
    assert any("test_a_position_of_this_very_test (test_rank_words.py:" in frame for frame in found.frames)
    assert not any(frame.count("/") > 4 or frame.startswith("/") for frame in found.frames)


def test_a_place_in_the_layout_is_not_asked_for_while_megatron_is_imported(monkeypatch):
    """By the watchdog's thread: the main thread may hang in that import, and would keep it waiting."""
    name = "megatron.core.parallel_state"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # half imported
    assert coordinates() == {}
    monkeypatch.delitem(sys.modules, name)
    assert coordinates() == {} and name not in sys.modules
