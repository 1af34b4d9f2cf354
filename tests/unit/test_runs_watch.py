"""`megacpp-stp runs watch`: what it shows, of runs in every state, on any terminal."""

import io
import json
import math
import os
import random
import time

import pytest
from rich.console import Console

from megacpp_stp.cli import runs_watch
from megacpp_stp.errors import UserError
from megacpp_stp.runs import tail as tail_module
from megacpp_stp.runs.alive import launcher_is_there
from megacpp_stp.runs.attempts import cut_metrics
from megacpp_stp.runs.files import METRICS, RECEIPT
from megacpp_stp.runs.invalid import invalidate
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.metrics import MetricsWriter
from megacpp_stp.runs.receipt import Receipt
from megacpp_stp.runs.sparkline import BARS, History, sparkline
from megacpp_stp.runs.tail import Tail, numbers_of
from megacpp_stp.runs.watch import Life, Watch, pick_run
from tests.unit.made_runs import answer, loss_of, make_run, refused, runs


def picture(watch, width=120):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(watch.frame(width))
    return console.export_text()


def looked(directory):
    watch = Watch(directory)
    watch.look()
    return watch


def going_on(directory, *overrides, **more):
    """A run that has not ended, as far as its receipt knows."""
    make_run(directory, *overrides, complete=False, **more)
    receipt = Receipt(directory)
    receipt.update(ended=None, reason="the run has not ended, or was killed together with its launcher")
    return directory


# Sparklines


def test_bars_rise_with_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([5.0, None, 5.0]) == f"{BARS[3]} {BARS[3]}"
    assert sparkline([]) == "" and sparkline([None, math.nan, math.inf]) == "   "
    assert sparkline([1.7e308, -1.7e308, math.nan]) == f"{BARS[-1]}{BARS[0]} "
    assert sparkline([1e-320, 0.0]) == f"{BARS[-1]}{BARS[0]}"


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 500])
@pytest.mark.parametrize("width", [1, 5, 100])
def test_a_thinned_series_is_means_of_neighbours(count, width):
    history = History(most=8)
    numbers = random.Random(count)
    values = [numbers.random() for _ in range(count)]
    for iteration, value in enumerate(values, start=101):
        history.add(iteration, {"x": value, **({"half": value} if iteration % 2 else {})})
    columns, firsts = history.columns("x", width), history.iterations(width)
    assert len(columns) == len(firsts) == history.count(width) <= min(width, 8)
    edges = [first - 101 for first in firsts] + [count]
    wanted = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    assert columns == pytest.approx(wanted)
    assert history.columns("missing", width) == [None] * len(columns)
    assert (history.first, history.last) == (101, 100 + count)


def test_iterations_that_were_not_recorded_leave_gaps():
    history = History()
    for iteration in (1, 2, 9, 10):
        history.add(iteration, {"x": 1.0})
    assert history.columns("x", 5) == [1.0, None, None, None, 1.0]
    assert History().columns("x", 5) == [] and History().iterations(5) == []


# Reading a file that grows


def append(path, *iterations, **values):
    with path.open("a") as handle:
        for iteration in iterations:
            handle.write(json.dumps({"iteration": iteration, **values}) + "\n")


def iterations_of(news):
    return [record["iteration"] for record in news.records]


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "m"
    tail = Tail(path)
    assert tail.look().records == []
    append(path, 1, 2)
    first = tail.look()
    assert (iterations_of(first), first.from_start) == ([1, 2], False)
    assert tail.look().records == []
    append(path, 3)
    with path.open("a") as handle:
        handle.write('{"iteration": 4, "lm_l')
    assert iterations_of(tail.look()) == [3]
    with path.open("a") as handle:
        handle.write('oss": 2.5}\n')
    news = tail.look()
    assert news.records == [{"iteration": 4, "lm_loss": 2.5}] and news.damaged == 0


@pytest.mark.parametrize("grown", [0, 1, 5, 20])
def test_a_file_that_a_resume_cut_back_is_read_anew(tmp_path, grown):
    """Shorter, as long, or longer than before by the time of the next look."""
    path = tmp_path / "m"
    tail = Tail(path)
    append(path, *range(1, 11), lm_loss=1.5)
    tail.look()
    cut_metrics(path, iteration=5, aside=tmp_path / "aside")
    append(path, *range(6, 6 + grown), lm_loss=2.5)
    news = tail.look()
    assert news.from_start
    assert iterations_of(news) == list(range(1, 6 + grown))
    assert tail.look().records == []


def test_a_file_that_is_replaced_or_goes_away_is_read_anew(tmp_path):
    path = tmp_path / "m"
    tail = Tail(path)
    append(path, 1, 2, 3)
    tail.look()
    append(tmp_path / "other", 1, 2, 3, 4)
    os.replace(tmp_path / "other", path)
    news = tail.look()
    assert (iterations_of(news), news.from_start) == ([1, 2, 3, 4], True)
    path.unlink()
    assert tail.look().from_start and not tail.look().from_start
    append(path, 1)
    assert iterations_of(tail.look()) == [1]


def test_lines_that_are_no_record_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(
        b'{"iteration": 1}\n\xff\xfe\nnull\n[1]\n{"iteration": true}\n{"iteration": 1}\n{"iteration": 2}\n'
    )
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n")
    news = Tail(path).look()
    assert (iterations_of(news), news.damaged) == ([1, 2], 6)


def test_a_long_file_is_read_in_pieces_and_an_endless_line_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m"
    append(path, *range(1, 30))
    monkeypatch.setattr(tail_module, "_CHUNK", 7)
    assert iterations_of(Tail(path).look()) == list(range(1, 30))
    monkeypatch.setattr(tail_module, "_LONGEST_LINE", 10)
    with path.open("a") as handle:
        handle.write("x" * 30)
    with pytest.raises(UserError, match="longer than any record"):
        Tail(path).look()


def test_only_numbers_that_can_be_drawn_are():
    record = {"a": 1, "b": True, "c": None, "d": "x", "e": {"f": 2.5, "g": None}, "h": 10**400, "i": [1], "j": 1e308}
    assert numbers_of({**record, "k": float("nan")}) == {"a": 1.0, "e.f": 2.5}


# Pictures


def test_a_picture_of_a_run_that_goes_on(tmp_path):
    run = going_on(tmp_path / "run", iterations=24)
    with launcher_lock(run):
        text = picture(looked(run))
    assert "nam56r-tiny" in text and "\nrunning\n" in text
    assert "iteration 24/40, 60%, 0:00 left (steps alone)" in text
    assert "STP: weight 0.02 from iteration 11: active" in text
    ruler = next(line for line in text.splitlines() if "before the gate" in line)
    assert ruler.split()[0] == "·" * 10 + "═" * 14
    lines = {line[:14].strip(): line for line in text.splitlines()}
    now, bars = lines["lm loss"].split()[2:4]
    assert now == f"{loss_of(24):.5g}"
    assert len(bars) == 24 and bars[0] == BARS[-1] and bars[-1] == BARS[0]
    assert lines["tokens/s"].split()[1] == "1,024"
    assert "1,001 to 1,024" in lines["tokens/s"]
    assert "MFU" not in text and "nan" not in text.lower()


def test_all_that_a_run_measures_has_a_row(tmp_path):
    run = going_on(tmp_path / "run", "stp.ramp_steps=8", iterations=15)
    (run / METRICS).unlink()
    writer = MetricsWriter(run / METRICS)
    for iteration in range(1, 16):
        writer.write(
            {
                "iteration": iteration,
                "lm_loss": float("nan") if iteration == 3 else 2.0,
                "bits_per_byte": 1.0,
                "stp_loss": 0.5,
                "stp_straightness_by_family": {"A": 0.25, "R": None if iteration > 1 else -0.5},
                "tokens_per_s": 5e5,
                "tflops_per_gpu": 412.5,
                "mfu": 0.417,
                "goodput": 0.93,
                "skipped_iterations": iteration // 5,
                "grad_norm": None if iteration == 15 else 1.5,
                "peak_memory_bytes": 3 * 2**30,
                "step_time_s": 2.0,
            }
        )
    text = picture(looked(run))
    now = {line[:14].strip(): line[14:25].strip() for line in text.splitlines()}
    assert now["straight A"] == "0.25" and now["straight R"] == "-"
    assert now["MFU"] == "0.417" and now["goodput"] == "0.93" and now["TFLOP/s a GPU"] == "412.5"
    assert now["skipped"] == "3" and now["memory, GiB"] == "3" and now["grad norm"] == "-"
    assert now["tokens/s"] == "500,000"
    assert "0:50 left" in text
    ruler = next(line for line in text.splitlines() if "before the gate" in line)
    assert ruler.split()[0] == "·" * 10 + "╱" * 5
    assert "weight 0.02 from iteration 11: warming" in text
    loss = next(line for line in text.splitlines() if line.startswith("lm loss"))
    assert loss[27:].startswith("▄▄ ▄")


def test_before_the_gate_the_picture_says_how_far_it_is(tmp_path):
    text = picture(looked(going_on(tmp_path / "a", iterations=4)))
    assert "STP: weight 0.02 from iteration 11, in 7" in text
    text = picture(looked(going_on(tmp_path / "b", "stp.weight=0", iterations=4)))
    assert "STP: measured, weight 0" in text and "before the gate" not in text
    assert "STP" not in picture(looked(going_on(tmp_path / "c", "stp=null", iterations=4)))


def test_how_a_run_ended_is_said(tmp_path):
    assert looked(make_run(tmp_path / "whole")).life is Life.COMPLETE
    ended = looked(make_run(tmp_path / "ended", complete=False, iterations=5))
    assert ended.life is Life.ENDED and "ended early: killed by a test" in picture(ended)
    assert " left" not in picture(ended)
    run = make_run(tmp_path / "bad")
    invalidate(run, "read the wrong data")
    assert picture(looked(run)).startswith("INVALID: read the wrong data")


def test_a_run_whose_launcher_was_killed_is_told_from_one_that_is_only_slow(tmp_path):
    run = going_on(tmp_path / "run", iterations=5)
    before = time.time() - 1000
    for path in run.iterdir():
        os.utime(path, (before, before))
    assert launcher_is_there(run) is False
    died = looked(run)
    assert died.life is Life.DIED and "no sign of life for 16:40" in picture(died)
    with launcher_lock(run):
        assert launcher_is_there(run) is True
        assert looked(run).life is Life.SILENT
    assert launcher_is_there(run) is False
    with launcher_lock(run):  # looking has left no lock
        pass
    append(run / METRICS, 6)
    just_killed = looked(run)
    assert just_killed.life is Life.UNSEEN
    assert "incomplete: no launcher of it is seen on this machine" in picture(just_killed)
    with launcher_lock(run):
        assert looked(run).life is Life.RUNNING


def test_a_run_is_followed_through_a_resume(tmp_path):
    run = going_on(tmp_path / "run", iterations=30)
    watch = looked(run)
    assert "iteration 30/40" in picture(watch)
    cut_metrics(run / METRICS, iteration=20, aside=tmp_path / "aside")
    receipt = Receipt(run)
    receipt.begin_attempt(from_iteration=20, plan_digest="x")
    watch.look()
    text = picture(watch)
    assert "iteration 20/40" in text and "attempt 2, went on from iteration 20" in text
    append(run / METRICS, 21, 22, lm_loss=1.0)
    watch.look()
    assert "iteration 22/40" in picture(watch)


def test_files_may_come_later_or_be_damaged(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    watch = looked(run)
    assert watch.life is Life.WAITING and "waiting for its first file" in picture(watch)
    make_run(tmp_path / "other", complete=False)
    (tmp_path / "other" / METRICS).rename(run / METRICS)
    watch.look()
    assert "iteration 40" in picture(watch)
    (run / RECEIPT).write_text("{")
    watch.look()
    assert "is not JSON" in picture(watch) and "lm loss" in picture(watch)
    (run / METRICS).unlink()
    os.mkfifo(run / METRICS)
    watch.look()
    assert "is no regular file" in picture(watch)
    (run / METRICS).unlink()
    (run / METRICS).write_text('{"iteration": 1}\nno record\n')
    watch.look()
    assert "lines that are no record: 1" in picture(watch)


@pytest.mark.parametrize("width", [1, 2, 10, 25, 39, 40, 60, 71, 72, 100, 250])
def test_any_terminal_is_wide_enough(tmp_path, width):
    watch = looked(going_on(tmp_path / "宽\N{COMBINING ACUTE ACCENT}run", iterations=40))
    for line in watch.frame(width).renderables:
        assert line.cell_len <= width and "\n" not in line.plain
    assert len(picture(watch, width).splitlines()) == len(watch.frame(width).renderables)


def test_hostile_values_do_not_break_the_picture(tmp_path):
    run = going_on(tmp_path / "run", iterations=1)
    receipt = json.loads((run / RECEIPT).read_text())
    receipt["recipe"]["name"] = "\x1b[2Jevil"
    receipt["iterations_planned"] = 10**400
    receipt["auxiliary_losses"]["stp"]["start_step"] = -4
    (run / RECEIPT).write_text(json.dumps(receipt))
    append(run / METRICS, 2**53 - 1, lm_loss=1e99, tokens_per_s=1e99, step_time_s=1e99, **{"mfu": {"a": {}}})
    text = picture(looked(run))
    assert "\x1b" not in text and "lm loss" in text and max(map(len, text.splitlines())) <= 120


# The command


def test_once_prints_one_picture(tmp_path):
    run = make_run(tmp_path / "run")
    text = answer("watch", run, "--once")
    assert text.count("lm loss") == 1 and "complete" in text
    assert answer("watch", run) == text  # no terminal here


def test_of_a_folder_the_newest_run_is_watched(tmp_path):
    older, newer = make_run(tmp_path / "b"), make_run(tmp_path / "a")
    for run, ago in ((older, 500), (newer, 100)):
        for path in run.iterdir():
            os.utime(path, (time.time() - ago,) * 2)
    assert pick_run(tmp_path) == newer and pick_run(older) == older
    os.utime(older / METRICS)
    assert pick_run(tmp_path) == older
    deep = make_run(tmp_path / "matrix" / "cell" / "1")
    assert pick_run(tmp_path / "matrix") == deep
    assert "complete" in answer("watch", tmp_path, "--once")


def test_what_is_nothing_to_watch_is_refused(tmp_path):
    assert refused("watch", tmp_path / "nowhere", "--once").problem == "is no directory"
    assert "neither a run" in refused("watch", tmp_path, "--once").problem


class Terminal(Console):
    """A terminal that keeps what was shown."""

    def __init__(self, **more):
        super().__init__(force_terminal=True, width=80, height=40, file=io.StringIO(), **more)


def test_live_it_ends_with_the_run_and_with_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console.Console", Terminal)
    run = make_run(tmp_path / "whole")
    assert runs("watch", run).exit_code == 0
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs_watch.time, "sleep", sleep)
    assert runs("watch", going_on(tmp_path / "on", iterations=3), "--interval", "0.5").exit_code == 0
    assert waits == [0.5] * 3
    # A folder is watched on, for the next run in it.
    waits.clear()
    (tmp_path / "empty").mkdir()
    assert runs("watch", tmp_path / "empty").exit_code == 0
    assert len(waits) == 3
    waits.clear()
    assert runs("watch", tmp_path).exit_code == 0
    assert len(waits) == 3
