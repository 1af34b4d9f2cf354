"""From a plan to running processes: preflight, run directory, torchrun, and what is left when it ends.

On several nodes this is node 0, which creates the run and closes it; `megacpp_stp.training.follower` is the others.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.env import EnvVar, run_environment
from megacpp_stp.plan.env_guard import check_environment, replaced
from megacpp_stp.plan.placement import place
from megacpp_stp.plan.render_world import warnings
from megacpp_stp.runs.attempts import rewind
from megacpp_stp.runs.begun import not_new, nothing_has_run
from megacpp_stp.runs.files import PLAN, RECEIPT, create_run_directory, write_json
from megacpp_stp.runs.lock import launcher_lock, require_free
from megacpp_stp.runs.nodes import Leader, Pace, PeerEnd, Stopped, is_on_offer
from megacpp_stp.runs.receipt import ALLOWED_UNREVIEWED, Receipt, plan_facts
from megacpp_stp.training.closing import Outcome, close_run
from megacpp_stp.training.last_words import last_words, say
from megacpp_stp.training.preflight import check_plan, check_port
from megacpp_stp.training.torchrun import (
    Node,
    Signals,
    Start,
    log_folder,
    rdzv_id_of,
    run_torchrun,
    stop_signals,
    torchrun_command,
)


class Peers(Protocol):
    """What a launch asks about the other nodes; `Leader` and `Follower` know."""

    def watch(self) -> PeerEnd | None:
        """The first that failed or went silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch on this node.

    Attributes:
        plan: What runs.
        run_dir: A new directory for it, or that of the run to go on with.
        port: Port of torchrun's rendezvous on one node; None lets torchrun take a free one.
        from_iteration: Of the checkpoint in `run_dir` to go on from, 0 to begin anew there; None for a new run.
        allow_unreviewed: Ids of patch surfaces that may meet upstream code that nobody reviewed.
        node: This node among several; None where there is one.
        own_plan: Whether `plan` was asked for here; else a node other than 0 takes the plan of the run that goes on.
    """

    plan: RunPlan
    run_dir: Path
    port: int | None = None
    from_iteration: int | None = None
    allow_unreviewed: tuple[str, ...] = ()
    node: Node | None = None
    own_plan: bool = True

    @property
    def rank(self) -> int:
        """Of this node."""
        return self.node.rank if self.node else 0

    @property
    def pace(self) -> Pace:
        """How long nodes wait for each other."""
        return Pace(wait=self.node.timeout) if self.node else Pace()

    def start(self) -> Start:
        """What is about to start; the directory of a run that goes on tells which attempt that is."""
        known = self.from_iteration is not None and (self.run_dir / RECEIPT).exists()
        attempt = Receipt(self.run_dir).attempts + 1 if known else 1
        given = self.node.rdzv_id if self.node else None
        return Start(
            attempt=attempt,
            from_iteration=self.from_iteration or 0,
            rdzv_id=given or rdzv_id_of(self.plan, self.run_dir, attempt),
        )

    def command(self, start: Start) -> list[str]:
        """The torchrun process and all its arguments."""
        return torchrun_command(self.plan, self.run_dir, start, node=self.node, port=self.port)

    def variables(self, start: Start) -> tuple[EnvVar, ...]:
        """The environment variables that the ranks get beside this process's own: the plan's, and the run's."""
        logs = log_folder(self.run_dir, attempt=start.attempt, node=self.rank)
        of_run = run_environment(
            self.plan.recipe, device=self.plan.device, run_dir=self.run_dir, logs=logs, node=self.rank
        )
        return (*self.plan.env, *of_run)

    def shell(self) -> str:
        """The same as a line that a shell takes."""
        start = self.start()
        env = [f"{variable.name}={shlex.quote(variable.value)}" for variable in self.variables(start)]
        return " ".join([*env, shlex.join(self.command(start))])

    def preflight(self) -> None:
        """Refuse a run that cannot be what the recipe says, before anything is written or started.

        Raises:
            UserError: What is missing or does not fit.
        """
        variables = self.variables(self.start())
        check_environment(variables, self.plan.recipe, os.environ)
        for text in replaced(variables, os.environ):
            say(text)
        if self.rank:
            return  # the rest once node 0 has offered a run, so that it hears of it
        for text in warnings(place(self.plan.recipe)):
            say(text)
        if self.port is not None:
            check_port(self.port)
        if self.node is not None:
            check_port(port_of(self.node.endpoint), field="--rdzv-endpoint")
        self._require_new()
        if self.from_iteration is not None:
            with launcher_lock(self.run_dir):
                pass  # taken again to run; said now, and not after what takes seconds
        self.check()

    def rehearse(self) -> None:
        """For a dry run: refuse a place in which the run could not begin or go on. Touches nothing.

        Raises:
            UserError: As `preflight`; on a node other than 0 what node 0 would say, unless it offers a run there now.
        """
        if self.rank and is_on_offer(self.run_dir):
            return
        self._require_new()
        if self.from_iteration is not None:
            require_free(self.run_dir)

    def _require_new(self) -> None:
        if self.from_iteration is None and os.path.lexists(self.run_dir):
            raise not_new(self.run_dir)

    def check(self) -> None:
        """Refuse a plan that this machine cannot run as it says.

        Raises:
            UserError: What is missing or does not fit.
        """
        check_plan(
            self.plan,
            allow_unreviewed=self.allow_unreviewed,
            run_dir=self.run_dir,
            from_iteration=self.from_iteration,
        )

    def execute(self, start: Start, signals: Signals, peers: Peers | None = None) -> tuple[int, PeerEnd | None]:
        """Start torchrun and wait.

        Args:
            start: What starts.
            signals: From `stop_signals`.
            peers: Whose `watch` says that another node has ended; None on one node.

        Returns:
            Its exit status, and the other node because of which it was ended.
        """
        ends: list[PeerEnd] = []

        def must_end() -> bool:
            end = peers.watch() if peers else None
            if end is not None and not ends:
                say(f"{end.text}: ending the ranks of this one")
                ends.append(end)
            return bool(ends)

        environment = os.environ | {variable.name: variable.value for variable in self.variables(start)}
        status = run_torchrun(self.command(start), environment, signals, must_end=must_end if peers else None)
        return status, ends[0] if ends else None

    def run(self) -> int:
        """Start and wait. Call `preflight` first.

        Returns:
            0; 2 when a rank found a mistake that the user can mend; 128 + n after signal n on any node; else 1.
        """
        if self.rank:
            from megacpp_stp.training.follower import follow

            return follow(self)
        with stop_signals() as signals:
            if self.from_iteration is None:
                create_run_directory(self.run_dir)
            with launcher_lock(self.run_dir):
                start = self.start()
                self._prepare()
                if self.node is not None:
                    return self._lead(start, signals)
                status, _ = self.execute(start, signals)
                return self._close(start, Outcome(torchrun=status, signal=signals.caught))

    def _prepare(self) -> None:
        """Make the directory the run's. Its lock is held, and it may have changed until then."""
        plan = self.plan.as_dict()
        if nothing_has_run(self.run_dir):
            write_json(self.run_dir / PLAN, plan)
            Receipt.create(self.run_dir, plan_facts(plan))
        elif self.from_iteration is None:
            raise not_new(self.run_dir)
        else:
            rewind(self.run_dir, plan, iteration=self.from_iteration)
        Receipt(self.run_dir).update(**{ALLOWED_UNREVIEWED: list(self.allow_unreviewed)})

    def _lead(self, start: Start, signals: Signals) -> int:
        """Node 0 of several: offer the run, run, and close it once the others have ended."""
        nodes = self.plan.recipe.launch.nodes
        leader = Leader(self.run_dir, nodes=nodes, stopped=lambda: signals.caught is not None, pace=self.pace)
        leader.offer(plan_digest=self.plan.digest, **asdict(start))
        say(f"node 0 waits for the other nodes, up to {self.pace.wait:g} s")
        try:
            leader.gather()
        except UserError as error:
            leader.refuse(error.problem)
            close_run(self.run_dir, Outcome(), refused=error.problem)
            raise
        except Stopped:
            leader.end(status=128 + (signals.caught or 0), signal=signals.caught)
            return self._close(start, Outcome(signal=signals.caught))
        status, ended_by = self.execute(start, signals, leader)
        caught = signals.caught or (ended_by.signal if ended_by else None)
        leader.end(status=128 + caught if caught else min(abs(status), 1), signal=caught)
        outcome = Outcome(torchrun=status, signal=signals.caught, ended_by=ended_by)
        # Twice: whoever sent the signal may kill this process before the other nodes have ended.
        close_run(self.run_dir, outcome, last=False)
        return self._close(start, replace(outcome, others=leader.others()))

    def _close(self, start: Start, outcome: Outcome) -> int:
        status = close_run(self.run_dir, outcome)
        if status and outcome.signal_of_any is None:
            for line in last_words(self.run_dir, logs=log_folder(self.run_dir, attempt=start.attempt, node=0).parent):
                say(line)
        return status


def port_of(endpoint: str) -> int:
    """The port of HOST:PORT.

    Raises:
        UserError: There is none.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError("is not HOST:PORT", field="--rdzv-endpoint", value=endpoint, fix="name node 0 and a free port")
    return int(port)
