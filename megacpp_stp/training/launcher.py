"""From a plan to running processes: preflight, run directory, torchrun, and what is left when it ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import ENTRY_MODULE, RunPlan
from megacpp_stp.plan.checkpoint import LOAD, SAVE, SCHEDULE_OF_THE_PLAN
from megacpp_stp.runs.attempts import rewind
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.failures import first_failure
from megacpp_stp.runs.files import EXIT, METRICS, PLAN, create_run_directory, exists_already, write_json
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.metrics import last_of, read_metrics
from megacpp_stp.runs.receipt import ALLOWED_UNREVIEWED, Receipt, plan_facts
from megacpp_stp.training.orphans import die_with_parent
from megacpp_stp.training.preflight import check_plan, check_port

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch on this node.

    Attributes:
        plan: What runs.
        run_dir: A new directory for it, or that of the run to go on with.
        port: Port of torchrun's rendezvous; None lets torchrun take a free one.
        from_iteration: Of the checkpoint in `run_dir` to go on from, 0 to begin anew there; None for a new run.
        allow_unreviewed: Ids of patch surfaces that may meet upstream code that nobody reviewed.
    """

    plan: RunPlan
    run_dir: Path
    port: int | None = None
    from_iteration: int | None = None
    allow_unreviewed: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The torchrun process and all its arguments."""
        rendezvous = ["--standalone"]
        if self.port is not None:
            rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}"]
        launch = self.plan.recipe.launch
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.processes_per_node)),
            *rendezvous,
            *("-m", ENTRY_MODULE),
            *self.plan.argv,
            *("--nam-plan", str(self.run_dir / PLAN), "--nam-run-dir", str(self.run_dir)),
            *self._checkpoint_options(),
        ]

    def _checkpoint_options(self) -> list[str]:
        if self.plan.recipe.training.checkpoint is None:
            return []
        directory = str(self.run_dir / CHECKPOINTS)
        loading = [LOAD, directory, SCHEDULE_OF_THE_PLAN] if self.from_iteration else []
        return [SAVE, directory, *loading]

    def shell(self) -> str:
        """The same as a line that a shell takes."""
        env = [f"{variable.name}={shlex.quote(variable.value)}" for variable in self.plan.env]
        return " ".join([*env, shlex.join(self.command())])

    def preflight(self) -> None:
        """Refuse a run that cannot be what the recipe says, before anything is written or started.

        Raises:
            UserError: What is missing or does not fit.
        """
        if self.plan.recipe.launch.nodes != 1:
            raise UserError(
                "only one node can be launched yet",
                field="launch.nodes",
                value=self.plan.recipe.launch.nodes,
                fix="set it to 1",
            )
        if self.port is not None:
            check_port(self.port)
        if self.from_iteration is None and self.run_dir.exists():
            raise exists_already(self.run_dir)
        if self.from_iteration is not None:
            with launcher_lock(self.run_dir):
                pass  # taken again to run; said now, and not after what takes seconds
        check_plan(self.plan, allow_unreviewed=self.allow_unreviewed)

    def run(self) -> int:
        """Start and wait. Call `preflight` first.

        Returns:
            0; 2 when a rank found a mistake that the user can mend; 128 + n after signal n; else 1.
        """
        if self.from_iteration is None:
            create_run_directory(self.run_dir)
        with launcher_lock(self.run_dir):
            return self._run()

    def _run(self) -> int:
        plan = self.plan.as_dict()
        if self.from_iteration is None:
            write_json(self.run_dir / PLAN, plan)
            Receipt.create(self.run_dir, plan_facts(plan))
        else:
            rewind(self.run_dir, plan, iteration=self.from_iteration)
        Receipt(self.run_dir).update(**{ALLOWED_UNREVIEWED: list(self.allow_unreviewed)})
        environment = {**os.environ, **{variable.name: variable.value for variable in self.plan.env}}
        environment["PYTHONUNBUFFERED"] = "1"
        returncode, caught = _run_forwarding_signals(self.command(), environment)
        status = self._close(returncode, caught)
        write_json(
            self.run_dir / EXIT,
            {
                "status": status,
                "torchrun_returncode": returncode,
                "signal": caught and signal.Signals(caught).name,
            },
        )
        Receipt(self.run_dir).end_attempt(exit_status=status)
        return status

    def _close(self, returncode: int, caught: int | None) -> int:
        """Say in the receipt how the run ended, where rank 0 could not, and find the exit status."""
        receipt = Receipt(self.run_dir)
        if not receipt.is_complete:
            path = self.run_dir / METRICS
            records = read_metrics(path) if path.exists() else []
            last = records[-1] if records else {}
            outcome = {"iterations_done": last.get("iteration", 0), "last": last_of(last)}
            failure = first_failure(self.run_dir)
            if caught is not None:
                receipt.fail(f"ended by {signal.Signals(caught).name}", kind="signal", **outcome)
            elif failure is not None:
                receipt.fail(f"rank {failure['rank']}: {failure['reason']}", kind=failure["kind"], **outcome)
            else:
                receipt.fail(f"torchrun ended with status {returncode} and no rank said why", kind="crash", **outcome)
        if caught is not None:
            return 128 + caught
        if returncode == 0:
            return 0 if receipt.is_complete else 1
        return 2 if receipt.failure_kind == "user" else 1


def _run_forwarding_signals(command: list[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Run to the end; a stop signal that we get ends all ranks and is reported."""
    caught: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)

    earlier = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
    try:
        # A session of its own: Ctrl-C reaches torchrun once, through us, and not each rank behind its back.
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
        children.append(child)
        if caught:  # before there was a child to tell
            child.send_signal(signal.SIGTERM)
        return child.wait(), caught[0] if caught else None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
