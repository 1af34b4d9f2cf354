"""Ends a process that no longer says that it goes on; a small program of its own, beside the one that starts it.

A thread cannot watch an interpreter that native code keeps, nor one that is being torn down, and a timer of the system
takes a suspension for a hang: it goes on while processes are stopped. This program counts its own ticks. They stop
with it where the whole job, the node or the laptop is suspended, and a tick in which the other process alone was
stopped is left out.

As a program it imports nothing but the standard library: it is there at once, and small.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WRITING_S = 2.0  # what is written to may be what hangs
STACKS = signal.SIGRTMIN + 5
"""What asks a process to write down its stacks."""
_STOPPED = "Tt"  # by a signal, by a debugger; proc(5), /proc/PID/stat


class Sentinel:
    """What a process holds of the one that watches it. Alive from the start, on guard from the first lease.

    Args:
        told: The file that it writes where it has ended this process; one that is there is left as it is.
        rank: Of this process, for what is told.
        tick: Seconds.
    """

    def __init__(self, told: Path, *, rank: int, tick: float) -> None:
        self._told, self._rank = told, rank
        theirs, self._pipe = os.pipe()
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), repr(tick)]
        try:
            self._pid = os.posix_spawn(
                sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0)]
            )
        finally:
            os.close(theirs)
        os.set_blocking(self._pipe, False)

    def lease(self, seconds: float, *, why: str, stacks_after: float | None = None) -> None:
        """Live for so many seconds more, not counting those of a suspension; each lease ends the one before.

        Args:
            seconds: Of ticks.
            why: What to tell where they pass and this process is still there.
            stacks_after: Seconds until this process gets the signal `STACKS`; None for never.
        """
        failure = {"rank": self._rank, "kind": "hang", "reason": why, "logs": None, "cause": None, "agreed": False}
        self._say({"seconds": seconds, "stacks": stacks_after, "told": str(self._told), "failure": failure})

    def dismiss(self) -> None:
        """Be watched no longer."""
        self._say({"seconds": None})
        os.close(self._pipe)
        for _ in range(200):  # it is quick; should it not be, its parent's end reaps it
            with suppress(ChildProcessError):
                if os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                    time.sleep(0.005)
                    continue
            return

    def _say(self, message: dict[str, object]) -> None:
        with suppress(OSError):  # full, as it is stopped; or gone
            os.write(self._pipe, json.dumps(message).encode() + b"\n")


class Count:
    """What is left of a lease.

    Args:
        tick: Seconds between two looks; longer ones were not watched, and count as two.
    """

    def __init__(self, tick: float) -> None:
        self._tick = tick
        self.left = float("inf")

    def after(self, seconds: float, *, stopped: bool) -> float:
        """What is left after `seconds`, in which the other process was `stopped` or not."""
        if not stopped:
            self.left -= min(seconds, 2 * self._tick)
        return self.left


def watch(parent: int, *, tick: float) -> None:
    """Read leases until there are no more, the parent is gone, or one has passed: then end the parent."""
    count, stacks, rest, message = Count(tick), Count(tick), b"", {}
    while os.getppid() == parent:
        before = time.monotonic()
        if select.select([0], [], [], tick)[0]:
            if not (read := os.read(0, 65536)):
                return
            *lines, rest = (rest + read).split(b"\n")
            if lines:
                message = json.loads(lines[-1])
                if message["seconds"] is None:
                    return
                count.left = message["seconds"]
                stacks.left = float("inf") if message["stacks"] is None else message["stacks"]
            continue
        passed, stopped = time.monotonic() - before, is_stopped(parent)
        if stacks.after(passed, stopped=stopped) <= 0:
            stacks.left = float("inf")
            os.kill(parent, STACKS)
        if count.after(passed, stopped=stopped) <= 0:
            _end(parent, message)
            return


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger; False where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in _STOPPED


def _end(parent: int, message: dict[str, object]) -> None:
    writing = threading.Thread(target=_tell, args=(message,), daemon=True)
    writing.start()
    writing.join(_WRITING_S)
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)


def _tell(message: dict[str, object]) -> None:
    failure = message["failure"]
    assert isinstance(failure, dict)
    text = f"megacpp-stp: rank {failure['rank']}: {failure['reason']}; its process is killed\n"
    with suppress(OSError):
        os.write(2, text.encode())
    with suppress(OSError), open(str(message["told"]), "x", encoding="utf-8") as file:
        json.dump({**failure, "time": time.time()}, file)


def main(parent: int, tick: float) -> None:
    """Watch the process that started this one, and may be gone by now."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the other, which may want time to end
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # a worker that the other has forked keeps the pipe open
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watch(parent, tick=tick)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
