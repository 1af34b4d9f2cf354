"""What a matrix costs: tokens and FLOPs of each run, and time by what its finished runs took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from megacpp_stp.ablate.cells import PlannedRun
from megacpp_stp.ablate.state import Step, Task
from megacpp_stp.plan import flops
from megacpp_stp.plan.parameters import parts
from megacpp_stp.runs.receipt import read_receipt


def tokens_of(run: PlannedRun) -> int:
    """That the run trains on."""
    training = run.plan.recipe.training
    return training.iterations * training.global_batch_size * training.sequence_length


def flops_of(run: PlannedRun) -> int:
    """Of training on them, all processes together; no recomputation, no evaluation (`megacpp_stp.plan.flops`)."""
    plan = run.plan
    return flops.total(plan.recipe, parts(plan.recipe, plan.layout)).training * tokens_of(run)


def seconds_left(tasks: Sequence[Task]) -> float | None:
    """Wall time of the open runs at the speed of the finished ones; None before one is finished.

    A run that goes on is counted as if it began anew.
    """
    spent = [(seconds, flops_of(task.run)) for task in tasks if (seconds := _seconds(task)) is not None]
    if not spent:
        return None
    rate = math.fsum(seconds for seconds, _ in spent) / sum(work for _, work in spent)
    return rate * sum(flops_of(task.run) for task in tasks if task.is_open)


def _seconds(task: Task) -> float | None:
    """That a finished run took; None for another, or where it does not say."""
    if task.step is not Step.KEEP:
        return None
    spans = [_span(attempt) for attempt in read_receipt(task.run.directory).get("attempts", [])]
    known = [span for span in spans if span is not None]
    return math.fsum(known) if known and len(known) == len(spans) else None


def _span(attempt: Mapping[str, Any]) -> float | None:
    try:
        began, ended = (datetime.fromisoformat(attempt[name]) for name in ("started", "ended"))
        return (ended - began).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None
