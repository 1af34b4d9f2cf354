"""The launchers of one run on several nodes: how they meet in the run directory, watch each other, and end together.

The directory is on a file system that all nodes share. Each launcher writes one file there, ``nodes/RANK.json``, whole
or not at all. Node 0 creates the run and offers it under a number drawn for this launch; the others answer with that
number and the digest of their own plan, so that neither an old directory of the same name nor another plan is taken.
While ranks run, node 0 watches all others and they watch node 0: a number that counts up is each one's sign of life,
so that the clocks of the nodes do not matter.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_json

NODES = "nodes"
_OFFERED, _JOINED, _RUNNING, _REFUSED, _ENDED = "offered", "joined", "running", "refused", "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds: to wait for each other, between two looks, between two signs of life, without one until a node is dead,
    and for the others to end after one of them: more than torchrun gives its ranks to end, and to die if they did not.
    """

    wait: float = 600.0
    look: float = 2.0
    beat: float = 15.0
    dead: float = 120.0
    end: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What node 0 is about to run.

    Attributes:
        launch: Drawn for this launch.
        plan_digest: Of its plan.
        rdzv_id: Under which torchrun's agents meet.
        from_iteration: Of the checkpoint that all ranks load; 0 for none.
        attempt: Which start of the run it is, from 1.
    """

    launch: str
    plan_digest: str
    rdzv_id: str
    from_iteration: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEnd:
    """How another node ended.

    Attributes:
        node: Which one.
        status: Exit status of its launcher; None when it went silent.
        signal: The signal that ended it, or None.
    """

    node: int
    status: int | None
    signal: int | None = None

    @property
    def text(self) -> str:
        """In a clause."""
        return f"node {self.node} " + ("went silent" if self.status is None else f"ended with status {self.status}")


def is_on_offer(directory: Path) -> bool:
    """Whether node 0 offers a run in a directory."""
    try:
        return read_json(directory / NODES / "0.json").get("state") == _OFFERED
    except UserError:
        return False


class Stopped(Exception):
    """A signal came while launchers waited for each other."""


class Superseded(Exception):
    """The offer was of a launch of node 0 that is over: it was killed, and another one has begun."""


class _Node:
    """One launcher's own file, and its eyes on those of others.

    Args:
        directory: The run directory.
        rank: Of this node.
        stopped: Whether a signal asks us to end.
        pace: How long things may take.
    """

    def __init__(self, directory: Path, *, rank: int, stopped: Callable[[], bool], pace: Pace) -> None:
        self._folder = directory / NODES
        self._rank = rank
        self._stopped = stopped
        self._pace = pace
        self._own: dict[str, Any] = {"beat": 0}
        self._launch = ""
        self._written = self._looked = time.monotonic()
        self._signs: dict[int, tuple[object, float]] = {}
        self._silent: set[int] = set()

    def _write(self, **changes: Any) -> None:
        self._own |= {**changes, "node": self._rank, "launch": self._launch, "beat": self._own["beat"] + 1}
        write_json(self._folder / f"{self._rank}.json", self._own)
        self._written = time.monotonic()

    def _read(self, rank: int) -> dict[str, Any]:
        """Another node's file; empty when there is none that can be read now."""
        try:
            return read_json(self._folder / f"{rank}.json")
        except UserError:
            return {}

    def _until(self, holds: Callable[[], bool]) -> bool:
        """Look until something holds; False when it takes too long."""
        deadline = time.monotonic() + self._pace.wait
        while not holds():
            if self._stopped():
                raise Stopped
            if time.monotonic() > deadline:
                return False
            time.sleep(min(self._pace.look, 0.2))
        return True

    def _watch(self, ranks: range | tuple[int, ...]) -> PeerEnd | None:
        now = time.monotonic()
        if now - self._written > self._pace.beat:
            # A file system that fails for a moment costs a beat, not the run.
            with suppress(OSError):
                self._write()
        if now - self._looked < self._pace.look:
            return None
        self._looked = now
        for rank in ranks:
            found = self._read(rank)
            if (end := self._end_of(rank, found)) is not None and end.status != 0:
                return end
            if end is None and self._is_silent(rank, found.get("beat"), now):
                self._silent.add(rank)
                return PeerEnd(node=rank, status=None)
        return None

    def _end_of(self, rank: int, found: dict[str, Any]) -> PeerEnd | None:
        if found and found.get("launch") != self._launch:
            return PeerEnd(node=rank, status=None)  # somebody else works in the directory
        if found.get("state") != _ENDED:
            return None
        return PeerEnd(node=rank, status=int(found["status"]), signal=found["signal"])

    def _is_silent(self, rank: int, beat: object, now: float) -> bool:
        seen, since = self._signs.get(rank, (None, now))
        if rank not in self._signs or beat not in (None, seen):
            self._signs[rank] = (beat, now)
            return False
        return now - since > self._pace.dead

    def end(self, *, status: int, signal: int | None) -> None:
        """Say how this launcher ended; nothing where it had no part in a launch, whose files are then not its own."""
        if self._launch:
            self._write(state=_ENDED, status=status, signal=signal)


class Leader(_Node):
    """Node 0: it offers the run, and closes it.

    Args:
        directory: The run directory, which it has created or brought back to a checkpoint.
        nodes: How many there are.
        stopped: Whether a signal asks us to end.
        pace: How long things may take.
    """

    def __init__(self, directory: Path, *, nodes: int, stopped: Callable[[], bool], pace: Pace) -> None:
        super().__init__(directory, rank=0, stopped=stopped, pace=pace)
        self._others = range(1, nodes)

    def offer(self, *, plan_digest: str, rdzv_id: str, from_iteration: int, attempt: int) -> None:
        """Let the others know; the plan is written."""
        self._folder.mkdir(exist_ok=True)
        self._launch = secrets.token_hex(8)
        facts = {"plan_digest": plan_digest, "rdzv_id": rdzv_id, "from_iteration": from_iteration, "attempt": attempt}
        self._write(state=_OFFERED, **facts)

    def gather(self) -> None:
        """Wait for all others, and let them start.

        Raises:
            UserError: One refused, or did not come.
            Stopped: A signal came first.
        """
        nonces: dict[str, str] = {}

        def all_there() -> bool:
            for rank in self._others:
                found = self._read(rank)
                if found.get("launch") != self._launch:
                    continue
                if found.get("state") == _REFUSED:
                    reason = f"node {rank} refused: {found.get('reason')}"
                    raise UserError(reason, field="--node-rank", fix="mend it there, and launch anew on all nodes")
                nonces[str(rank)] = found.get("nonce", "")
            return len(nonces) == len(self._others)

        if not self._until(all_there):
            missing = ", ".join(str(rank) for rank in self._others if str(rank) not in nonces)
            raise UserError(
                f"node {missing} did not come within {self._pace.wait:g} s",
                field="--node-rank",
                fix="start the same command there, on a shared file system; --node-timeout waits longer",
            )
        self._write(state=_RUNNING, members=nonces)

    def refuse(self, reason: str) -> None:
        """Nothing will run: whoever waits may go."""
        self._write(state=_REFUSED, reason=reason)

    def watch(self) -> PeerEnd | None:
        """Give a sign of life; the first other node that failed or went silent. To be called often."""
        return self._watch(self._others)

    def others(self) -> dict[int, PeerEnd]:
        """How each other node ended, once they had time to; silent ones too."""
        deadline = time.monotonic() + self._pace.end
        ends: dict[int, PeerEnd] = {}
        while not self._silent.union(ends).issuperset(self._others) and time.monotonic() < deadline:
            for rank in self._others:
                if (end := self._end_of(rank, self._read(rank))) is not None:
                    ends[rank] = end
            time.sleep(0.1)
        return {rank: ends.get(rank, PeerEnd(node=rank, status=None)) for rank in self._others}


class Follower(_Node):
    """Any other node: it takes the run that node 0 offers, if it is its own."""

    def await_offer(self, *, rdzv_id: str | None) -> Offer:
        """Wait until node 0 offers a run.

        Args:
            rdzv_id: What it must be called; None for any.

        Raises:
            UserError: It did not in time.
            Stopped: A signal came first.
        """
        found: dict[str, Any] = {}

        def offered() -> bool:
            found.clear()
            found.update(self._read(0))
            return found.get("state") == _OFFERED and rdzv_id in (None, found.get("rdzv_id"))

        if not self._until(offered):
            named = f" under --rdzv-id {rdzv_id}" if rdzv_id else ""
            raise UserError(
                f"node 0 did not offer the run there within {self._pace.wait:g} s{named}",
                field="--run-dir",
                value=str(self._folder.parent),
                fix="start node 0, give all nodes the same --run-dir and --rdzv-id, on a file system that they share",
            )
        self._launch = found["launch"]
        names = ("launch", "plan_digest", "rdzv_id", "from_iteration", "attempt")
        return Offer(**{name: found[name] for name in names})

    def refuse(self, reason: str) -> None:
        """Tell node 0 that this node cannot run that."""
        self._write(state=_REFUSED, reason=reason)

    def join(self) -> None:
        """Answer the offer, and wait until node 0 has everybody.

        Raises:
            UserError: Node 0 gave up, or another launcher has this rank.
            Stopped: A signal came first.
            Superseded: Node 0 has begun anew; `await_offer` has its new offer.
        """
        nonce = secrets.token_hex(8)
        self._write(state=_JOINED, nonce=nonce)
        found: dict[str, Any] = {}

        def decided() -> bool:
            found.clear()
            found.update(self._read(0))
            return bool(found) and (found.get("launch") != self._launch or found.get("state") != _OFFERED)

        field, fix = "--node-rank", "see what node 0 says, and launch anew on all nodes"
        if not self._until(decided):
            problem = f"node 0 did not start the run within {self._pace.wait:g} s"
            raise UserError(problem, field=field, value=self._rank, fix=fix)
        if found.get("launch") != self._launch:
            self._launch = ""
            raise Superseded
        if found.get("state") != _RUNNING:
            reason = found.get("reason") or "it ended"
            raise UserError(f"node 0 gave up: {reason}", field=field, value=self._rank, fix=fix)
        if found["members"].get(str(self._rank)) != nonce:
            raise UserError(
                "another launcher has joined as this node", field=field, value=self._rank, fix="give each node its own"
            )
        self._write(state=_RUNNING)

    def watch(self) -> PeerEnd | None:
        """Give a sign of life; whether node 0 failed or went silent. To be called often."""
        return self._watch((0,))

    def signal_of_leader(self) -> int | None:
        """The signal that ended node 0, which may be known only after our ranks have ended; None for none."""
        deadline = time.monotonic() + self._pace.end
        while time.monotonic() < deadline:
            if (end := self._end_of(0, self._read(0))) is not None:
                return end.signal
            time.sleep(0.1)
        return None
