"""From a plan to running processes: preflight, run directory, torchrun, and what is left when it ends."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from packaging.specifiers import SpecifierSet

from megacpp_stp.data.manifest import load_manifest
from megacpp_stp.errors import UserError
from megacpp_stp.flce.limits import limits
from megacpp_stp.patches.records import require
from megacpp_stp.patches.registry import Registry
from megacpp_stp.patches.upstream import SUPPORTED, open_core
from megacpp_stp.plan.build import ENTRY_MODULE, Device, RunPlan
from megacpp_stp.plan.checkpoint import LOAD, SAVE, SCHEDULE_OF_THE_PLAN
from megacpp_stp.runs.attempts import rewind
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.failures import first_failure
from megacpp_stp.runs.files import EXIT, METRICS, PLAN, create_run_directory, exists_already, write_json
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.metrics import last_of, read_metrics
from megacpp_stp.runs.receipt import ALLOWED_UNREVIEWED, Receipt, plan_facts
from megacpp_stp.training.orphans import die_with_parent
from megacpp_stp.training.upstream_check import require_accepted

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_INSTALL_TE = "pip install --no-build-isolation 'megacpp-stp[te]'"


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
        require_runnable(self.plan)
        require_train_extra()
        if self.plan.recipe.launch.nodes != 1:
            raise UserError(
                "only one node can be launched yet",
                field="launch.nodes",
                value=self.plan.recipe.launch.nodes,
                fix="set it to 1",
            )
        _check_environment(self.plan)
        _check_data(self.plan)
        if self.plan.device == "cuda":
            _check_gpus(self.plan)
            _check_loadable(self.plan)
        if self.port is not None:
            _check_port(self.port)
        if self.from_iteration is None and self.run_dir.exists():
            raise exists_already(self.run_dir)
        if self.from_iteration is not None:
            with launcher_lock(self.run_dir):
                pass  # taken again to run; said now, and not after what takes seconds
        _check_backend(self.plan)
        _check_fused_loss(self.plan)
        self._check_patches()
        require_accepted(self.plan)  # last: it takes seconds

    def _check_patches(self) -> None:
        """Judge what the plan replaces upstream, from files; each rank does so again, and proves it."""
        records = Registry.load().examine(self.plan.as_dict(), core=open_core(), allow_unreviewed=self.allow_unreviewed)
        require(records)
        for warning in (record.warning for record in records if record.warning):
            print(f"megacpp-stp: {warning}", file=sys.stderr, flush=True)

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


def resolve_device(choice: str, *, processes: int) -> tuple[Device, str]:
    """The device for ``--device`` and why.

    Args:
        choice: ``cpu``, ``cuda`` or ``auto``: CUDA when this machine has a GPU for each process, else CPU.
        processes: Processes on this node.
    """
    if choice == "cpu":
        return "cpu", "asked for"
    if choice == "cuda":
        return "cuda", "asked for"
    if choice != "auto":
        raise UserError("is no device", field="--device", value=choice, fix="use cpu, cuda or auto")
    require_train_extra()
    gpus = _gpu_count()
    if gpus >= processes:
        return "cuda", f"{gpus} GPUs for {processes} processes"
    return "cpu", f"{gpus} GPUs for {processes} processes"


def require_runnable(plan: RunPlan) -> None:
    """Refuse a plan of which this version cannot run a part.

    Raises:
        UserError: The first gap, with all others in its message.
    """
    if plan.gaps:
        first, *rest = plan.gaps
        more = "".join(f"\n  also: {gap.field}: {gap.what}" for gap in rest)
        raise UserError(
            f"can be planned and checked, but not launched by this version: {first.what}",
            field=first.field,
            fix=f"launch a recipe that `megacpp-stp plan` shows without gaps, such as nam56r-tiny{more}",
        )


def require_train_extra() -> None:
    """Refuse where torch or a fitting megatron-core is not installed.

    Raises:
        UserError: With the command that installs them.
    """
    fix = "pip install 'megacpp-stp[train]'"
    for module in ("torch", "megatron.core", "transformers"):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise UserError(f"{module} is not installed", field="extra train", fix=fix)
    try:
        megatron = version("megatron-core")
    except PackageNotFoundError:
        raise UserError("megatron-core is not installed as a package", field="extra train", fix=fix) from None
    if megatron not in SpecifierSet(SUPPORTED):
        raise UserError(f"megatron-core must be {SUPPORTED}", field="extra train", value=megatron, fix=fix)


def _check_backend(plan: RunPlan) -> None:
    if plan.recipe.model.backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "needs Transformer Engine, which is not installed",
            field="model.backend",
            value="te",
            fix=f"{_INSTALL_TE}, or use backend torch; docs/backends.md",
        )


def _check_fused_loss(plan: RunPlan) -> None:
    backend = plan.recipe.training.fused_cross_entropy
    for limit in limits(plan.argv, backend=backend) if backend else ():
        problem = f"{limit.option} {limit.why}"
        raise UserError(problem, field="training.fused_cross_entropy", value=backend, fix=limit.fix)


def _check_data(plan: RunPlan) -> None:
    manifest = load_manifest(Path(plan.recipe.data.path), field="data.path")
    wanted, found = plan.recipe.model.vocab_size, manifest.tokenizer.vocab_size
    if wanted != found:
        raise UserError(
            f"the tokenizer in {plan.recipe.data.path} has {found} tokens",
            field="model.vocab_size",
            value=wanted,
            fix=f"--set model.vocab_size={found}, or prepare the data with --vocab-size {wanted}",
        )
    for name in ("train", "valid"):
        tokens = manifest.split(name).tokens
        if tokens <= plan.recipe.training.sequence_length:
            raise UserError(
                f"the {name} split has {tokens} tokens, less than one sequence",
                field="training.sequence_length",
                value=plan.recipe.training.sequence_length,
                fix="prepare more text, or shorten the sequence",
            )


def _check_environment(plan: RunPlan) -> None:
    for variable in plan.env:
        found = os.environ.get(variable.name)
        if found is not None and found != variable.value and not variable.replaces:
            raise UserError(
                f"is set to {found!r}, but the run needs {variable.value!r}: {variable.why}",
                field=variable.name,
                fix=f"unset {variable.name}",
            )


def _check_gpus(plan: RunPlan) -> None:
    gpus, wanted = _gpu_count(), plan.recipe.launch.processes_per_node
    if gpus < wanted:
        raise UserError(
            f"{wanted} processes need a GPU each, this machine shows {gpus}",
            field="--device",
            value="cuda",
            fix="use --device cpu, or a machine with more GPUs",
        )


def _check_loadable(plan: RunPlan) -> None:
    """Refuse checkpoints that could be written but not read; `megacpp_stp.training.torch_adam` mends that on CPUs."""
    optimizer, checkpoint = plan.recipe.optimizer, plan.recipe.training.checkpoint
    known = ("transformer_engine", "apex")
    if checkpoint and optimizer.distributed and not any(importlib.util.find_spec(name) for name in known):
        raise UserError(
            "on a GPU, Megatron's distributed optimizer cannot load its checkpoints without Transformer Engine's Adam",
            field="training.checkpoint",
            fix=f"{_INSTALL_TE}, or set it to null, or optimizer.distributed to false",
        )


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_port(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot be used: {error}",
                field="--port",
                value=port,
                fix="name a free port, or leave --port out",
            ) from None


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
