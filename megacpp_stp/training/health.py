"""``training.health`` of a plan, put to work on one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megacpp_stp.plan.health import watched_minutes
from megacpp_stp.training.finite import Finite
from megacpp_stp.training.progress import Progress
from megacpp_stp.training.watchdog import Limits, Watchdog

_RECORD = "TORCH_FR_DUMP_TEMP_FILE"  # where torch's flight recorder writes, without the rank


def watchdog_of(
    plan: Mapping[str, Any], directory: Path, *, rank: int, progress: Progress, to_the_end: bool
) -> Watchdog:
    """What ends this rank when it hangs.

    Args:
        plan: The verified plan.
        directory: The run directory.
        rank: Of this process.
        progress: What its main thread marks.
        to_the_end: Whether the process ends after it.
    """
    return Watchdog(
        directory,
        rank=rank,
        world_size=plan["world_size"],
        progress=progress,
        limits=Limits.of(plan["recipe"]["training"]["health"]["hang_minutes"]),
        place=coordinates,
        to_the_end=to_the_end,
        dump=(lambda: _dump_collectives(rank)) if plan["device"] == "cuda" else lambda: None,
    )


def outlast_suspensions(plan: Mapping[str, Any], args: Any) -> None:
    """Leave it to the watchdog, which does not count them, to end what hangs.

    Args:
        plan: The verified plan.
        args: Megatron's, before it initialises.
    """
    args.distributed_timeout_minutes = watched_minutes(plan["recipe"]["training"]["health"]["hang_minutes"])


def finite_of(plan: Mapping[str, Any], *, device: torch.device, iteration: Callable[[], int], in_a_row: int) -> Finite:
    """What looks at this rank's numbers.

    Args:
        plan: The verified plan.
        device: Where the rank computes.
        iteration: Returns the number of iterations completed.
        in_a_row: Steps left out just before this start of the run.
    """
    training = plan["recipe"]["training"]
    scale = training["loss_scale"]
    return Finite(
        device=device,
        iteration=iteration,
        most_skipped=training["health"]["most_skipped"],
        in_a_row=in_a_row,
        lowest_scale=None if scale is None else scale["minimum"],
    )


def coordinates() -> dict[str, int]:
    """This rank's place in the layout; empty before Megatron has made its groups."""
    # Importing it here would wait for the main thread, which may hang in an import.
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if not getattr(parallel_state, "model_parallel_is_initialized", bool)():
        return {}
    assert parallel_state is not None
    return {
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
    }


def _dump_collectives(rank: int) -> None:
    """What NCCL's flight recorder holds, as it would be written at NCCL's own time-out, which comes later."""
    if place := os.environ.get(_RECORD):
        Path(f"{place}{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
