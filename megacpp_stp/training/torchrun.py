"""torchrun: its line for one node of a run, and the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megacpp_stp.plan.build import ENTRY_MODULE, RunPlan
from megacpp_stp.plan.checkpoint import LOAD, SAVE, SCHEDULE_OF_THE_PLAN
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.files import PLAN
from megacpp_stp.training.orphans import LAUNCHER, die_with_parent

LOGS = "logs"
AGENT_MODULE = "megacpp_stp.training.agent"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_S = 0.5
MEETING_S = 600.0
"""How long the processes of torchrun wait for each other, where nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """This node among several.

    Attributes:
        rank: From 0.
        endpoint: HOST:PORT at which node 0 lets all nodes meet.
        rdzv_id: What the meeting is called; None for a name from the run.
        timeout: Seconds to wait for the other nodes.
    """

    rank: int
    endpoint: str
    rdzv_id: str | None = None
    timeout: float = MEETING_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run.

    Attributes:
        attempt: Which, from 1.
        from_iteration: Of the checkpoint to load; 0 for none.
        rdzv_id: Under which torchrun's agents meet.
    """

    attempt: int
    from_iteration: int
    rdzv_id: str


def rdzv_id_of(plan: RunPlan, run_dir: Path, attempt: int) -> str:
    """A name for the meeting of a run's nodes that no other run has."""
    return f"{run_dir.name}-{plan.digest[:12]}-{attempt}"


def log_folder(run_dir: Path, *, attempt: int, node: int) -> Path:
    """Where the output of a node's ranks goes."""
    return run_dir / LOGS / f"attempt-{attempt}" / f"node-{node}"


def torchrun_command(
    plan: RunPlan, run_dir: Path, start: Start, *, node: Node | None = None, port: int | None = None
) -> list[str]:
    """The torchrun process of one node and all its arguments.

    Each rank's output goes to files; that of a node's first and last rank is shown too, since rank 0 says what
    happens, and Megatron prints its losses on the last one.

    Args:
        plan: What runs.
        run_dir: The run directory.
        start: Which start of it.
        node: This node among several; None where there is one.
        port: Of the rendezvous of one node; None lets torchrun take a free one.
    """
    launch = plan.recipe.launch
    logs = log_folder(run_dir, attempt=start.attempt, node=node.rank if node else 0)
    shown = sorted({0, launch.processes_per_node - 1})
    return [
        *(sys.executable, "-m", AGENT_MODULE),
        *("--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.processes_per_node)),
        *_rendezvous(start, node=node, port=port),
        *("--max-restarts", "0"),
        *("--log-dir", str(logs), "--tee", "3", "--local-ranks-filter", ",".join(map(str, shown))),
        *("--log-line-prefix-template", "[rank ${rank}] "),
        *("-m", ENTRY_MODULE),
        *plan.argv,
        *("--nam-plan", str(run_dir / PLAN), "--nam-run-dir", str(run_dir)),
        *_checkpoint_options(plan, run_dir, start.from_iteration),
    ]


def _rendezvous(start: Start, *, node: Node | None, port: int | None) -> list[str]:
    """How torchrun's processes meet.

    By its static rendezvous (``static_tcp_rendezvous.py``), which alone heeds --node-rank: c10d numbers nodes by
    address and process id (``dynamic_rendezvous.py``), so that the ranks would not be where the plan has them. It
    listens on one port of node 0 and its time-out is that of the meeting and of its store. What it lacks, to notice
    that a node has died, the launchers do.
    """
    if node is None and port is None:
        return ["--standalone", "--rdzv-conf", f"read_timeout={int(MEETING_S)}"]
    place = node or Node(rank=0, endpoint=f"localhost:{port}")
    return [
        *("--node-rank", str(place.rank), "--rdzv-backend", "static", "--rdzv-endpoint", place.endpoint),
        *("--rdzv-id", start.rdzv_id, "--rdzv-conf", f"timeout={int(place.timeout)}"),
    ]


def _checkpoint_options(plan: RunPlan, run_dir: Path, from_iteration: int) -> list[str]:
    if plan.recipe.training.checkpoint is None:
        return []
    directory = str(run_dir / CHECKPOINTS)
    loading = [LOAD, directory, SCHEDULE_OF_THE_PLAN] if from_iteration else []
    return [SAVE, directory, *loading]


@dataclass(slots=True)
class Signals:
    """The stop signals that came, and whom they are passed on to."""

    caught: int | None = None
    child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Remember the first, and end torchrun, which ends its ranks."""
        self.caught = self.caught or number
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """From here on, Ctrl-C, SIGTERM and SIGHUP end the ranks and are reported, instead of ending this process.

    One that was ignored before stays so: that is what ``nohup`` does.
    """
    signals = Signals()
    wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, signals.forward) for number in wanted}
    try:
        yield signals
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def run_torchrun(
    command: list[str], environment: Mapping[str, str], signals: Signals, *, must_end: Callable[[], bool] | None = None
) -> int:
    """Run to the end.

    Args:
        command: From `torchrun_command`.
        environment: All of its environment, but for what tells its ranks the process id of this one.
        signals: From `stop_signals`.
        must_end: Asked twice a second whether the ranks are to be ended; None to wait for torchrun and signals alone.

    Returns:
        Its exit status.
    """
    # A session of its own: Ctrl-C reaches torchrun once, through us, and not each rank behind its back.
    known = {**environment, LAUNCHER: str(os.getpid())}
    child = subprocess.Popen(command, env=known, start_new_session=True, preexec_fn=die_with_parent)
    signals.child = child
    try:
        if signals.caught:  # before there was a child to tell
            child.send_signal(signal.SIGTERM)
        if must_end is None:
            return child.wait()
        told = False
        while True:
            try:
                return child.wait(timeout=LOOK_S)
            except subprocess.TimeoutExpired:
                if not told and must_end():
                    child.send_signal(signal.SIGTERM)
                    told = True
    finally:
        signals.child = None
