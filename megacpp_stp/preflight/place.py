"""Judging the place that a run writes to: permission, and room for metrics and checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.footprint import ADAM_MOMENTS
from megacpp_stp.plan.kept import COMPUTE_BYTES, FP32
from megacpp_stp.plan.memory import GIB
from megacpp_stp.plan.parameters import parts
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, fine, refused
from megacpp_stp.runs.checkpoints import CHECKPOINTS

_RECORD_BYTES = 4096
"""Of one iteration in metrics.jsonl, TensorBoard's copy of it included; a record with two taps has 900."""
_MORE = 1.1
"""Indices and padding of a checkpoint: 5 to 6 % of one of 1.8 million parameters, less of larger ones."""


def check_place(case: Case) -> Iterator[Finding]:
    """Whether the run directory can be written, and holds what the run leaves."""
    if case.run_dir is None:
        return
    place = nearest(case.run_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = f"{place} is {'not writable' if place.is_dir() else 'no directory'}"
        fix = "name another place with --run-dir, or mend the permissions"
        why = "receipt, metrics and checkpoints go there"
        yield refused("run directory", what, why=why, fix=fix, field="--run-dir")
        return
    yield fine("run directory", f"{case.run_dir} can be written")
    if case.plan is None:
        return
    need, how = _need(case.plan, from_iteration=case.from_iteration or 0)
    free = shutil.disk_usage(place).free
    found = f"{_size(free)} free, {_size(need)} needed: {how}"
    if need > free:
        fix = "use another disk (--run-dir), or set training.checkpoint.keep_every or a larger interval"
        yield refused(
            "disk space", found, why="the run would end where a checkpoint does not fit", fix=fix, field="--run-dir"
        )
    else:
        yield fine("disk space", found)


def check_checkpoint(case: Case) -> Iterator[Finding]:
    """Whether the checkpoint that a run goes on from is all there, readable, and in the form that the plan loads."""
    if case.run_dir is None or not case.from_iteration:
        return
    folder = case.run_dir / CHECKPOINTS / f"iter_{case.from_iteration:07d}"
    fix = "bring it back, or move it away to go on from an earlier one"
    unreadable = next((path for path in sorted(folder.glob("*")) if not _reads(path)), None)
    if unreadable is not None:
        what = f"{unreadable.name} of iteration {case.from_iteration} cannot be read"
        yield refused("checkpoint", what, why="the run goes on from it", fix=fix)
        return
    kind = _kind(folder)
    if kind != "torch_dist":
        why = "the plan loads torch_dist alone"
        yield refused("checkpoint", f"iteration {case.from_iteration} is {kind}", why=why, fix=fix)
        return
    yield fine("checkpoint", f"iteration {case.from_iteration}, {kind}")


def checkpoint_bytes(plan: RunPlan) -> int:
    """Size of one checkpoint of a plan: weights, Adam's two moments, and fp32 copies of the weights.

    `torch_dist` writes each tensor once, whatever the layout.  Copies are there in 16-bit training, and with the
    distributed optimizer always (``distrib_optimizer.py`` of megatron-core 0.19.2, fully reshardable form).
    """
    recipe = plan.recipe
    size = 0
    for weight in (weight for part in parts(recipe, plan.layout) for weight in part.weights):
        is_fp32 = recipe.training.precision == "fp32" or weight.keeps_fp32
        stored = FP32 if is_fp32 else COMPUTE_BYTES[recipe.training.precision]
        copy = 0 if is_fp32 and not recipe.optimizer.distributed else FP32
        size += weight.count * (stored + ADAM_MOMENTS * FP32 + copy)
    return size


def checkpoints_kept(plan: RunPlan, *, from_iteration: int) -> int:
    """How many checkpoints a run writes that are there at one time, at most."""
    checkpoint, last = plan.recipe.training.checkpoint, plan.recipe.training.iterations
    if checkpoint is None:
        return 0
    saved = {*range(checkpoint.interval, last + 1, checkpoint.interval), last}
    saved = {iteration for iteration in saved if iteration > from_iteration}
    if checkpoint.keep_every is None:
        return len(saved)
    stay = {iteration for iteration in saved if iteration % checkpoint.keep_every == 0}
    # The one before goes when the next is whole.
    return len(stay) + min(2, len(saved - stay))


def _need(plan: RunPlan, *, from_iteration: int) -> tuple[int, str]:
    """Bytes that a run writes, and how they come about."""
    one, many = checkpoint_bytes(plan), checkpoints_kept(plan, from_iteration=from_iteration)
    records = _RECORD_BYTES * (plan.recipe.training.iterations - from_iteration)
    how = f"{many} checkpoints of {_size(one)}, and metrics" if many else "metrics; no checkpoints"
    return int(_MORE * one * many) + records, how


def nearest(path: Path) -> Path:
    """The first of a path and its parents that is there, as far as this user may look."""
    return next((place for place in (path, *path.absolute().parents) if os.path.exists(place)), Path("/"))


def _reads(path: Path) -> bool:
    try:
        with open(path, "rb") as handle:
            handle.read(1)
    except IsADirectoryError:
        return os.access(path, os.R_OK | os.X_OK)
    except OSError:
        return False
    return True


def _kind(folder: Path) -> str:
    """The form of a checkpoint, as Megatron's metadata.json says it (``core/dist_checkpointing/core.py``)."""
    try:
        content = json.loads((folder / "metadata.json").read_bytes())
        return str(content["sharded_backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return "of unknown form"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
