"""What a launch is refused for before anything is written or started, on the machine that launches.

Each check names the field, what was found and the fix.  What only a rank can see is checked by each rank.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megacpp_stp.data.manifest import load_manifest
from megacpp_stp.errors import UserError
from megacpp_stp.flce.limits import limits
from megacpp_stp.patches.records import require
from megacpp_stp.patches.registry import Registry
from megacpp_stp.patches.upstream import SUPPORTED, open_core
from megacpp_stp.plan.build import Device, RunPlan
from megacpp_stp.training.upstream_check import require_accepted

_INSTALL_TE = "pip install --no-build-isolation 'megacpp-stp[te]'"


def check_plan(plan: RunPlan, *, allow_unreviewed: tuple[str, ...] = ()) -> None:
    """Refuse a plan that this machine cannot run as it says.

    Args:
        plan: What is to run.
        allow_unreviewed: Ids of patch surfaces that may meet upstream code that nobody reviewed.

    Raises:
        UserError: What is missing or does not fit.
    """
    require_runnable(plan)
    require_train_extra()
    _check_environment(plan)
    _check_data(plan)
    if plan.device == "cuda":
        _check_gpus(plan)
        _check_loadable(plan)
    _check_backend(plan)
    _check_fused_loss(plan)
    _check_patches(plan, allow_unreviewed)
    require_accepted(plan)  # last: it takes seconds


def _check_patches(plan: RunPlan, allow_unreviewed: tuple[str, ...]) -> None:
    """Judge what the plan replaces upstream, from files; each rank does so again, and proves it."""
    records = Registry.load().examine(plan.as_dict(), core=open_core(), allow_unreviewed=allow_unreviewed)
    require(records)
    for warning in (record.warning for record in records if record.warning):
        print(f"megacpp-stp: {warning}", file=sys.stderr, flush=True)


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


def check_port(port: int) -> None:
    """Refuse a port that cannot be bound here.

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
                field="--port",
                value=port,
                fix="name a free port, or leave --port out",
            ) from None
