"""What a launch would do, without doing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacpp_stp.preflight.inputs import index_caches
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.files import ENV, EXIT, METRICS, PATCHES, PLAN, RANKS, RECEIPT
from megacpp_stp.runs.nodes import NODES
from megacpp_stp.training.launcher import Launch
from megacpp_stp.training.torchrun import log_folder


def planned_launch(launch: Launch) -> dict[str, Any]:
    """All of it as plain data.

    Args:
        launch: What would run; nothing of it has been started.
    """
    start = launch.start()
    variables = launch.variables(start)
    return {
        "plan_digest": launch.plan.digest,
        "run_directory": str(launch.run_dir),
        "node": launch.rank,
        "nodes": launch.plan.recipe.launch.nodes,
        "from_iteration": start.from_iteration,
        "environment": {variable.name: variable.value for variable in variables},
        "argv": launch.plan.argv,
        "command": launch.command(start),
        "files": [str(path) for path in _files(launch)],
    }


def _files(launch: Launch) -> Iterator[Path]:
    """Files and folders (for many) that this node's processes write."""
    directory, start = launch.run_dir, launch.start()
    if launch.rank == 0:
        yield from (directory / name for name in (PLAN, RECEIPT, METRICS, PATCHES, ENV, RANKS, EXIT))
        if launch.plan.recipe.training.checkpoint is not None:
            yield directory / CHECKPOINTS
        if start.attempt > 1:
            yield directory / f"attempt-{start.attempt - 1}"
        yield from index_caches(launch.plan.recipe)
    if launch.node is not None:
        yield directory / NODES / f"{launch.rank}.json"
    yield log_folder(directory, attempt=start.attempt, node=launch.rank)
    caches = (Path(variable.value) for variable in launch.variables(start) if variable.name == "TRITON_CACHE_DIR")
    yield from (cache for cache in caches if directory in cache.parents)
