"""The one list of checks: ``launch`` stops at what it refuses, ``doctor`` shows all of it.

On the machine that launches, before anything is written or started.  What only a rank can see is checked by each rank
(`megacpp_stp.training.preflight_ranks`).
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megacpp_stp.errors import UserError
from megacpp_stp.flce.limits import limits
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.records import refusal as patch_refusal
from megacpp_stp.patches.registry import Registry
from megacpp_stp.patches.upstream import SUPPORTED, open_core
from megacpp_stp.plan.build import Device, RunPlan
from megacpp_stp.plan.env import run_environment
from megacpp_stp.plan.env_guard import check_environment
from megacpp_stp.plan.kernels import kernel_packages
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, Verdict, asked, fine, refusal, warning
from megacpp_stp.preflight.hardware import (
    check_cuda,
    check_gpus,
    check_groups,
    check_links,
    check_memory,
    check_shared_memory,
)
from megacpp_stp.preflight.inputs import check_arguments, check_data, check_same_data
from megacpp_stp.preflight.machine import apex_kind, look
from megacpp_stp.preflight.place import check_checkpoint, check_place
from megacpp_stp.preflight.software import INSTALL_TE, INSTALL_TRAIN, check_software
from megacpp_stp.runs.files import RECEIPT
from megacpp_stp.training.upstream_check import require_accepted

Check = Callable[[Case], Iterable[Finding]]
_SHELL = "a variable must not change a run behind its recipe's back"
_NAN_CHECK = "check_for_nan_in_loss_and_grad"


def check_plan(
    plan: RunPlan,
    *,
    allow_unreviewed: tuple[str, ...] = (),
    run_dir: Path | None = None,
    from_iteration: int | None = None,
) -> None:
    """Refuse a plan that this machine cannot run as it says; warnings go to stderr.

    Args:
        plan: What is to run.
        allow_unreviewed: Ids of patch surfaces that may meet upstream code that nobody reviewed.
        run_dir: Where it would write; None leaves the place unjudged.
        from_iteration: Of the checkpoint in `run_dir` to go on from; None for a new run.

    Raises:
        UserError: The first thing that is missing or does not fit, with all others in its message.
    """
    require_runnable(plan)
    machine = look(ask_torch=plan.device == "cuda")
    case = Case(machine=machine, plan=plan, run_dir=run_dir, from_iteration=from_iteration)
    findings: list[Finding] = []
    for check in checks(case, allow_unreviewed=allow_unreviewed):
        if check is _environment:
            continue  # the launcher has judged it, with the variables that only it knows
        if check is _upstream and refusal(findings) is not None:
            break  # the others are said at once; this one takes seconds
        findings += check(case)
    for one in findings:
        if one.verdict is Verdict.WARNING:
            fix = f"\n  fix: {one.fix}" if one.fix else ""
            print(f"megacpp-stp: WARNING: {one.text}{fix}", file=sys.stderr, flush=True)
    if (error := refusal(findings)) is not None:
        raise error


def checks(case: Case, *, allow_unreviewed: tuple[str, ...] = ()) -> Iterator[Check]:
    """All checks that apply, in the order in which they are told; the slowest last.

    Args:
        case: What will be judged.
        allow_unreviewed: As for `check_plan`.
    """
    yield check_software
    yield from (check_gpus, check_cuda, check_links, check_groups, check_memory, check_shared_memory)
    yield from (check_place, check_checkpoint)
    plan = case.plan
    if plan is None:
        return
    yield lambda _: [asked("recipe", lambda: require_runnable(plan), why="what this version can run")]
    yield _environment
    yield lambda _: [asked("arguments", lambda: check_arguments(plan), why="a run must be what its recipe says")]
    yield lambda _: [
        asked("data", lambda: _data(case, plan), why="what a model learns from must be what its run names")
    ]
    if plan.device == "cuda":
        yield lambda _: [asked("loading checkpoints", lambda: _check_loadable(plan), why="a stopped run must go on")]
    yield lambda _: [asked("kernels", lambda: _check_kernels(plan), why="nothing else runs in the place of a kernel")]
    yield lambda _: [asked("fused loss", lambda: _check_fused_loss(plan), why="it must be the loss that Megatron has")]
    yield lambda _: _patches(plan, allow_unreviewed)
    yield _upstream


def _environment(case: Case) -> Iterator[Finding]:
    """What the shell has set against the plan, or beside it."""
    assert case.plan is not None
    plan, directory = case.plan, case.run_dir or Path("runs") / case.plan.recipe.name
    of_run = run_environment(plan.recipe, device=plan.device, run_dir=directory, logs=directory, node=0)
    yield asked("environment", lambda: check_environment((*plan.env, *of_run), plan.recipe, os.environ), why=_SHELL)


def _data(case: Case, plan: RunPlan) -> str:
    found = check_data(plan)
    if case.run_dir is not None and case.from_iteration is not None and (case.run_dir / RECEIPT).exists():
        check_same_data(plan, case.run_dir)
    return found


def _patches(plan: RunPlan, allow_unreviewed: tuple[str, ...]) -> Iterator[Finding]:
    """Judge what the plan replaces upstream, from files; each rank does so again, and proves it."""
    why = "megatron-core is not what the patch was reviewed with"
    try:
        records = Registry.load().examine(plan.as_dict(), core=open_core(), allow_unreviewed=allow_unreviewed)
    except UserError as error:
        yield _refused("patches", error, why=why)
        return
    for record in records:
        name = f"patch {record.id}"
        if record.state in (State.REFUSED, State.RETIRED):
            yield _refused(name, patch_refusal(record, (record,)), why=why)
        elif record.warning is not None:
            found = record.warning.removeprefix("WARNING: ")
            yield warning(name, found, why="you allowed it", fix="review it, as docs/patches.md says")
        else:
            yield fine(name, f"as reviewed at {record.reviewed_at}")


def _refused(name: str, error: UserError, *, why: str) -> Finding:
    def give() -> str:
        raise error

    return asked(name, give, why=why)


def _upstream(case: Case) -> Iterator[Finding]:
    """Megatron's own word on the arguments, in a process of its own."""
    assert case.plan is not None
    plan, name, why = case.plan, "Megatron's word", "its parser and its validation have the last one"
    if not {"torch", "megatron-core"} <= case.machine.packages.keys():
        yield warning(name, "not asked: torch or megatron-core is missing", why=why, fix=INSTALL_TRAIN)
        return
    try:
        rows = require_accepted(plan)
    except UserError as error:
        yield _refused(name, error, why=why)
        return
    yield fine(name, f"accepted, {len(rows)} values derived")
    off = any(row.name == _NAN_CHECK and row.after != "True" for row in rows)
    if plan.recipe.training.health.nonfinite == "skip":
        yield fine("NaN checks", "ours: a step whose numbers are not finite is left out")
    elif off and plan.recipe.training.precision != "fp16":
        switched = UserError("Megatron switches its NaN checks off", field="arguments", fix="report it, with the plan")
        yield _refused("NaN checks", switched, why="a run must not go on after a NaN")
    elif off:
        yield fine("NaN checks", "on the loss; fp16 gradients may overflow, which loss scaling takes care of")
    else:
        yield fine("NaN checks", "on loss and gradients")


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
    fix = INSTALL_TRAIN
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


def _check_kernels(plan: RunPlan) -> None:
    """Refuse kernels that are not installed, judged from files: another package may have the same name."""
    for needed in kernel_packages(plan.recipe):
        found = importlib.util.find_spec(needed.package)
        folders = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
        if not any((folder / needed.module).is_file() for folder in folders):
            what = "is not installed" if not folders else f"is installed without {needed.module}"
            problem = f"needs the package {needed.package}, which {what}"
            raise UserError(problem, field=needed.field, value=needed.kernel, fix=needed.fix)


def _check_fused_loss(plan: RunPlan) -> None:
    backend = plan.recipe.training.fused_cross_entropy
    for limit in limits(plan.argv, backend=backend) if backend else ():
        problem = f"{limit.option} {limit.why}"
        raise UserError(problem, field="training.fused_cross_entropy", value=backend, fix=limit.fix)


def _check_loadable(plan: RunPlan) -> None:
    """Refuse checkpoints that could be written but not read; `megacpp_stp.training.torch_adam` mends that on CPUs."""
    optimizer, checkpoint = plan.recipe.optimizer, plan.recipe.training.checkpoint
    known = importlib.util.find_spec("transformer_engine") is not None or apex_kind() == "NVIDIA's"
    if checkpoint and optimizer.distributed and not known:
        raise UserError(
            "on a GPU, Megatron's distributed optimizer cannot load its checkpoints without Transformer Engine's Adam",
            field="training.checkpoint",
            fix=f"{INSTALL_TE}, or set it to null, or optimizer.distributed to false",
        )


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_port(port: int, *, field: str = "--port") -> None:
    """Refuse a port that cannot be bound here.

    Args:
        port: Of a rendezvous.
        field: The option that named it.

    Raises:
        UserError: With the system's reason.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot be used: {error}",
                field=field,
                value=port,
                fix="name a free port" + (", or leave --port out" if field == "--port" else ", on all nodes"),
            ) from None
