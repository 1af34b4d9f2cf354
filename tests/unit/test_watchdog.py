"""The watchdog of a rank, in processes without a model: what it writes, when it ends one, and when it does not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megacpp_stp.runs.failures import first_failure
from megacpp_stp.runs.hangs import HANG, drop_empty_stacks, hang_text, read_reports
from megacpp_stp.training.progress import Mark, Progress
from megacpp_stp.training.watchdog import Limits, Stall

# Fast enough for a test, slow enough for a machine that has other things to do.
LIMITS = "Limits(usual=0.6, slow=30.0, look=0.05, grace=1.5)"
BEGIN = f"""
    import sys, time, ctypes, threading
    from pathlib import Path
    from megacpp_stp.training.progress import Mark, Progress
    from megacpp_stp.training.watchdog import Limits, Watchdog
    rank, world, what = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    progress = Progress(lambda: 6)
    def wait_in_data():
        time.sleep(60)
    with Watchdog(Path(sys.argv[1]), rank=rank, world_size=world, progress=progress, limits={LIMITS},
                  place=lambda: {{"pipeline": rank}}):
        print("ready", flush=True)
        for _ in range(3):
            progress.data(training=True)
            progress.stepped()
        if what == "sleeps":
            progress.data(training=True)
            wait_in_data()
        if what == "keeps the interpreter":
            progress.data(training=True)
            time.sleep(0.2)  # armed, not yet hanging
            ctypes.PyDLL(None).sleep(60)
        if what == "starts":
            progress.mark = Mark("start-up", slow=True)
            time.sleep(1.5)
        if what == "works":
            for _ in range(100):
                progress.data(training=True)
                time.sleep(0.02)
    print("done", flush=True)
"""


def rank(directory, number, world, what):
    arguments = [sys.executable, "-c", textwrap.dedent(BEGIN), str(directory), str(number), str(world), what]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Scene:
    """Ranks of one run."""

    def __init__(self, directory, *doings):
        directory.mkdir()
        self.directory = directory
        self.ranks = [rank(directory, number, len(doings), what) for number, what in enumerate(doings)]

    def signal(self, number, what):
        os.kill(self.ranks[number].pid, what)

    def ended(self, number):
        """Exit status and stderr of a rank."""
        errors = self.ranks[number].communicate(timeout=60)[1]
        return self.ranks[number].returncode, errors


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """All at once, since most of what they do is to wait."""
    place = tmp_path_factory.mktemp("scenes")
    found = {
        "stopped": Scene(place / "a", "sleeps", "works", "works"),
        "blocked": Scene(place / "b", "sleeps", "keeps the interpreter"),
        "alone": Scene(place / "c", "keeps the interpreter"),
        "starts": Scene(place / "d", "starts"),
        "works": Scene(place / "e", "works"),
        "goes on": Scene(place / "f", "works", "leaves"),
    }
    try:
        for scene in found.values():
            for child in scene.ranks:
                assert child.stdout.readline() == "ready\n"
            if scene is found["stopped"]:
                scene.signal(2, signal.SIGSTOP)
            if scene is found["goes on"]:
                scene.signal(0, signal.SIGSTOP)
        time.sleep(1.2)
        found["goes on"].signal(0, signal.SIGCONT)
        yield found
    finally:
        for child in (child for scene in found.values() for child in scene.ranks):
            child.kill()
            child.communicate()


def test_a_rank_that_waits_says_where_and_ends(scenes):
    scene = scenes["stopped"]
    status, said = scene.ended(0)
    assert status == 1
    assert "megacpp-stp: rank 0: no progress for 1 s; this rank is in data of iteration 7 at wait_in_data" in said
    report = read_reports(scene.directory)[0]
    assert (report.phase, report.iteration, report.microbatch, report.place) == ("data", 7, 1, {"pipeline": 0})
    assert report.frames[0].startswith("wait_in_data (")
    assert "in wait_in_data" in (scene.directory / "hang-0.txt").read_text()
    assert str(Path(sys.prefix)) not in (scene.directory / "hang-0.json").read_text()
    assert json.loads((scene.directory / HANG).read_text()) == {"noticed_by_rank": 0}
    failure = first_failure(scene.directory)
    assert (failure["kind"], failure["rank"]) == ("hang", 0)


def test_the_others_are_asked_and_a_stopped_rank_is_told_by_its_silence(scenes):
    scene = scenes["stopped"]
    status, said = scene.ended(1)
    assert status == 1
    assert "another rank makes no progress" in said
    assert {report.rank for report in read_reports(scene.directory)} == {0, 1}
    text = hang_text(scene.directory)
    assert "rank 2 said nothing: its process is stopped or gone; " in text
    assert "rank 0 stopped in data of iteration 7 at wait_in_data" in text
    drop_empty_stacks(scene.directory)
    assert not (scene.directory / "hang-2.txt").exists() and (scene.directory / "hang-0.txt").exists()


def test_a_blocked_interpreter_leaves_its_stacks(scenes):
    """Alone it is ended too: nobody else could."""
    scene = scenes["alone"]
    assert scene.ended(0)[0] == 1
    assert 'File "<string>"' in (scene.directory / "hang-0.txt").read_text()
    assert hang_text(scene.directory) == "the interpreter of rank 0 is blocked (hang-0.txt)"


def test_one_among_others_is_told_by_them_with_its_stacks(scenes):
    scene = scenes["blocked"]
    assert scene.ended(0)[0] == 1
    assert scene.ranks[1].poll() is None
    assert "rank 1 said nothing: the interpreter of rank 1 is blocked (hang-1.txt)" in hang_text(scene.directory)


@pytest.mark.parametrize("what", ["starts", "works", "goes on"])
def test_a_rank_that_comes_on_is_left_alone_and_leaves_nothing(scenes, what):
    """More than the limit in all, less between two marks; what may take long; and one that was only stopped."""
    scene = scenes[what]
    assert scene.ended(0) == (0, "")
    assert list(scene.directory.iterdir()) == []


def test_time_in_which_nobody_watched_does_not_count():
    stall, first = Stall(4.0), Mark("data", 2, 1)
    again = Mark(*first)  # equal, and a new mark
    looks = [(first, 100.0, 0.0), (first, 101.0, 1.0), (first, 3000.0, 5.0), (again, 3001.0, 0.0), (again, 3003.0, 2.0)]
    assert [stall.after(mark, now=now) for mark, now, _ in looks] == [seconds for _, _, seconds in looks]


def test_limits_of_a_recipe():
    limits = Limits.of(10.0)
    assert (limits.usual, limits.slow) == (600.0, 1800.0)
    assert limits.look <= 2.0
    assert Limits.of(90.0).slow == 5400.0
    assert (limits.at(Mark("data", 2, 1)), limits.at(Mark("save", 2, None, True))) == (600.0, 1800.0)


def test_a_marks_life():
    done = 4  # of the checkpoint
    progress = Progress(lambda: done)
    assert progress.mark == Mark("start-up", None, None, True)
    progress.data(training=False)
    assert progress.mark == ("evaluation", 4, 1, True)
    for microbatch in (1, 2):
        progress.data(training=True)
        assert progress.mark == ("data", 5, microbatch, True)
        progress.forward()
        assert progress.mark == ("forward", 5, microbatch, True)
        progress.backward()
        assert progress.mark == ("backward", 5, microbatch, True)
    progress.optimizer()
    assert progress.mark == ("optimizer", 5, None, True)
    progress.stepped()
    assert progress.mark == ("optimizer", 5, None, False)
    for microbatch in (1, 2):  # Megatron says so of the next iteration only when that begins
        progress.data(training=False)
        progress.forward()
        progress.backward()
        assert progress.mark == ("evaluation", 5, microbatch, False)
    progress.save()
    assert progress.mark == ("save", 5, None, True)
    done = 5
    progress.data(training=True)
    assert progress.mark == ("data", 6, 1, False)


def test_a_mark_is_a_new_object_though_equal():
    progress = Progress(lambda: 0)
    progress.data(training=True)
    progress.forward()
    first = progress.mark
    progress.forward()
    assert progress.mark == first and progress.mark is not first
