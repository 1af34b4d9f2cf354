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

from megacpp_stp.runs.failures import first_failure, report_failure
from megacpp_stp.runs.hangs import HANG, drop_empty_stacks, hang_text, read_reports
from megacpp_stp.training import sentinel, watchdog
from megacpp_stp.training.progress import Mark, Progress
from megacpp_stp.training.sentinel import STACKS, Count, is_stopped
from megacpp_stp.training.watchdog import Limits, Stall, Watchdog

# Fast enough for a test, slow enough for a machine that has other things to do.
LIMITS = "Limits(usual=0.6, slow=30.0, look=0.05, grace=1.5)"
BEGIN = f"""
    import atexit, ctypes, os, sys, time, threading
    from pathlib import Path
    from megacpp_stp.training.progress import Mark, Progress
    from megacpp_stp.training.watchdog import Limits, Watchdog
    rank, world, what = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    progress = Progress(lambda: 6)
    limits = {LIMITS}
    if len(sys.argv) > 5:  # it will be suspended before that
        limits = Limits(usual=1.5, slow=30.0, look=0.05, grace=1.5)
    def keep_the_interpreter():
        mutex = ctypes.create_string_buffer(64)  # zeros are one that is free
        for _ in range(2):  # the second waits for ever, whatever signals come; PyDLL lets go of nothing
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    if what == "stays":
        limits = Limits(usual=0.6, slow=1.2, look=0.05, grace=1.5)
        atexit.register(keep_the_interpreter)
    def deep(frames):
        return frames and deep(frames - 1)
    def wait_in_data():
        time.sleep(60)
    with Watchdog(Path(sys.argv[1]), rank=rank, world_size=world, progress=progress, limits=limits,
                  place=lambda: {{"pipeline": rank}}, to_the_end=what in ("stays", "ends")):
        if what == "leaves a child" and not os.fork():
            time.sleep(60)  # as a data worker may, with all files that are open
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(3):
            progress.data(training=True)
            progress.stepped()
        if what == "sleeps":
            progress.data(training=True)
            wait_in_data()
        if what == "keeps the interpreter":
            progress.data(training=True)
            time.sleep(0.2)  # armed, not yet hanging
            keep_the_interpreter()
        if what == "starts":
            progress.mark = Mark("start-up", slow=True)
            time.sleep(1.5)
        if what in ("works", "ends", "leaves a child"):
            for _ in range(100):
                progress.data(training=True)
                time.sleep(0.01)
                for _ in range(50):
                    deep(700)  # frames come and go: whoever reads them without the interpreter's lock reads nothing
    print("done", flush=True)
"""


def rank(directory, number, world, what, *more):
    arguments = [sys.executable, "-c", textwrap.dedent(BEGIN), str(directory), str(number), str(world), what, *more]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(arguments, **pipes, text=True)


def children(pid):
    """Numbers of the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Scene:
    """Ranks of one run, which wait to begin."""

    def __init__(self, directory, *doings, suspended=False):
        directory.mkdir()
        self.directory = directory
        self.suspended = suspended
        more = ("suspended",) if suspended else ()
        self.ranks = [rank(directory, number, len(doings), what, *more) for number, what in enumerate(doings)]

    def be_ready(self):
        for child in self.ranks:
            assert child.stdout.readline() == "ready\n"

    def begin(self):
        for child in self.ranks:
            child.stdin.write("go\n")
            child.stdin.flush()

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
        "goes on": Scene(place / "f", "works", "leaves", suspended=True),
        "goes on alone": Scene(place / "g", "works", suspended=True),
        "goes on with its sentinel": Scene(place / "h", "works", suspended=True),
        "blocked and suspended": Scene(place / "i", "keeps the interpreter", suspended=True),
        "all blocked": Scene(place / "j", "keeps the interpreter", "keeps the interpreter"),
        "stays": Scene(place / "k", "stays"),
        "ends": Scene(place / "l", "ends"),
    }
    try:
        for scene in found.values():
            scene.be_ready()
        found["stopped"].signal(2, signal.SIGSTOP)
        for scene in found.values():
            scene.begin()
        time.sleep(0.4)
        (watching,) = children(found["goes on with its sentinel"].ranks[0].pid)
        os.kill(watching, signal.SIGSTOP)
        suspended = [scene for scene in found.values() if scene.suspended]
        for scene in suspended:
            scene.signal(0, signal.SIGSTOP)
        time.sleep(2.5)  # more than the limit of these
        os.kill(watching, signal.SIGCONT)
        time.sleep(0.2)
        assert found["blocked and suspended"].ranks[0].poll() is None
        for scene in suspended:
            scene.signal(0, signal.SIGCONT)
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


@pytest.mark.parametrize("what", ["alone", "blocked and suspended"])
def test_a_blocked_interpreter_leaves_its_stacks_and_is_ended(scenes, what):
    """Alone it is ended too: nobody else could. A suspension in between does not change that."""
    scene = scenes[what]
    status, said = scene.ended(0)
    assert status == -signal.SIGKILL
    assert "megacpp-stp: rank 0: the interpreter is blocked: native code keeps Python's lock" in said
    assert 'File "<string>"' in (scene.directory / "hang-0.txt").read_text()
    failure = first_failure(scene.directory)
    assert (failure["kind"], failure["rank"]) == ("hang", 0)
    assert failure["text"] == hang_text(scene.directory) == "the interpreter of rank 0 is blocked (hang-0.txt)"


def test_where_all_interpreters_are_blocked_all_are_ended(scenes):
    scene = scenes["all blocked"]
    assert [scene.ended(number)[0] for number in (0, 1)] == [-signal.SIGKILL] * 2
    assert first_failure(scene.directory)["text"] == "the interpreter of ranks 0, 1 is blocked (hang-0.txt)"


def test_a_process_that_does_not_end_after_its_work_is_ended(scenes):
    """With its interpreter blocked, while that is taken down."""
    scene = scenes["stays"]
    status, said = scene.ended(0)
    assert status == -signal.SIGKILL
    assert "rank 0: its work was done, and its process did not end" in said
    assert "in keep_the_interpreter" in said  # its stacks
    assert first_failure(scene.directory)["text"] == "rank 0: its work was done, and its process did not end"


@pytest.mark.parametrize("what", ["works", "leaves a child"])
def test_a_sentinel_does_not_outlive_its_process(tmp_path, what):
    """Killed without warning, with the pipe kept open by a worker or not."""
    scene = Scene(tmp_path / "run", what)
    child = scene.ranks[0]
    scene.be_ready()
    started = children(child.pid)
    sentinels = [pid for pid in started if b"sentinel.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert (len(sentinels), len(started)) == (1, 2 if what == "leaves a child" else 1)
    child.kill()
    child.wait()
    try:
        deadline = time.monotonic() + 20
        while is_there(sentinels[0]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for pid in set(started) - set(sentinels):
            os.kill(pid, signal.SIGKILL)
        child.communicate()


def test_one_among_others_is_told_by_them_with_its_stacks(scenes):
    scene = scenes["blocked"]
    assert scene.ended(0)[0] == 1
    assert scene.ended(1)[0] == -signal.SIGKILL  # where torchrun has not ended it before
    assert first_failure(scene.directory)["rank"] == 0
    assert "rank 1 said nothing: the interpreter of rank 1 is blocked (hang-1.txt)" in hang_text(scene.directory)


@pytest.mark.parametrize("what", ["starts", "works", "goes on", "goes on alone", "goes on with its sentinel", "ends"])
def test_a_rank_that_comes_on_is_left_alone_and_leaves_nothing(scenes, what):
    """More than the limit in all, less between two marks; what may take long; and one that was only stopped."""
    scene = scenes[what]
    assert scene.ended(0) == (0, "")
    assert list(scene.directory.iterdir()) == []


def test_a_lease_counts_what_was_watched():
    count = Count(0.5)
    assert count.after(3000.0, stopped=False) == float("inf")  # nothing is promised yet
    count.left = 5.0
    looks = [(0.5, False, 4.5), (3000.0, False, 3.5), (0.5, True, 3.5), (3000.0, True, 3.5), (0.5, False, 3.0)]
    assert [count.after(seconds, stopped=stopped) for seconds, stopped, _ in looks] == [left for *_, left in looks]


def test_what_a_rank_has_said_itself_stays(tmp_path, capfd):
    """A rank that failed, and whose process then does not end."""
    failure = {"rank": 3, "kind": "hang", "reason": "it stays", "logs": None, "cause": None, "agreed": False}
    for name in ("error-3.json", "other.json"):
        if name == "error-3.json":
            (tmp_path / name).write_text("its own")
        sentinel._tell({"told": str(tmp_path / name), "failure": failure})
    assert (tmp_path / "error-3.json").read_text() == "its own"
    written = json.loads((tmp_path / "other.json").read_text())
    assert {**written, "time": 0} == {**failure, "time": 0}
    assert capfd.readouterr().err == "megacpp-stp: rank 3: it stays; its process is killed\n" * 2
    report_failure(tmp_path, rank=4, error=RuntimeError("x"))
    assert json.loads((tmp_path / "error-4.json").read_text()).keys() == written.keys()  # of one form


def test_a_stopped_process_is_known_by_its_state():
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert is_stopped(child.pid)
        child.send_signal(signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
        assert not is_stopped(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not is_stopped(child.pid)  # nobody


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
    progress.closing()
    assert progress.mark == ("closing", 6, None, True)


def test_a_mark_is_a_new_object_though_equal():
    progress = Progress(lambda: 0)
    progress.data(training=True)
    progress.forward()
    first = progress.mark
    progress.forward()
    assert progress.mark == first and progress.mark is not first


@pytest.mark.parametrize("world_size", [1, 4])
def test_among_others_a_blocked_rank_is_ended_after_they_had_time_to_say_where_they_wait(
    tmp_path, monkeypatch, world_size
):
    leases, stacks = [], []

    class Sentinel:
        def __init__(self, told, *, rank, tick):
            pass

        def lease(self, seconds, *, why, stacks_after=None):
            leases.append(seconds)
            stacks.append(stacks_after)

        def dismiss(self):
            pass

    monkeypatch.setattr(watchdog, "Sentinel", Sentinel)
    limits = Limits(usual=60.0, slow=90.0, look=0.5, grace=5.0)
    with Watchdog(tmp_path, rank=0, world_size=world_size, progress=Progress(lambda: 0), limits=limits):
        pass
    # The others look every half second, and give each other the grace.
    assert leases[0] == 90.0 + 4 * 0.5 + (4 * 5.0 if world_size > 1 else 0.0)
    # The start may take long, and what follows it may block before the next look.
    assert stacks[0] == 60.0 / 2
    os.kill(os.getpid(), STACKS)  # one that comes late ends nobody
