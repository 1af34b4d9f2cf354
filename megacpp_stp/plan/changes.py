"""What of its plan may change when a run goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import Difference, PlanDiff, compare
from megacpp_stp.plan.facts import Side

# Fields, and sections with all below them, that change neither the model nor the loss nor what a checkpoint holds.
MAY_CHANGE = (
    "training.iterations",  # and with it the rest of the learning rate's schedule
    "training.log_interval",
    "training.eval_interval",
    "training.eval_iterations",
    "training.checkpoint",
    "training.health",
    "stp.diagnose_every",
    "data.path",  # not what is there: its content must be the same
    "data.workers",
    "megatron",
)
_MOST_SHOWN = 8


def check_changes(planned: Mapping[str, Any], wanted: Mapping[str, Any], *, allowed: bool) -> None:
    """Refuse to go on with another plan than the run's, except for what may change.

    Args:
        planned: The run's plan as plain data.
        wanted: The plan that it is to go on with.
        allowed: Whether the user allows changes at all.

    Raises:
        UserError: They differ, and that is not allowed or not possible; all differences are listed.
    """
    if planned["digest"] == wanted["digest"]:
        return
    found = _compared(planned, wanted)
    fixed = [item for item in found.differences if not _may_change(item.path)]
    if allowed and not fixed:
        return
    listed = _listed(fixed or found.differences or found.labels)
    more = f"\n  and {len(listed) - _MOST_SHOWN} more" if len(listed) > _MOST_SHOWN else ""
    if fixed:
        fix = "leave these as they are in the run, or start a new one; may change: " + ", ".join(MAY_CHANGE)
    else:
        fix = "leave the recipe out to go on with the run's own plan, or add --allow-plan-change"
    raise UserError(
        "would change the run's plan:" + "".join(f"\n  {line}" for line in listed[:_MOST_SHOWN]) + more,
        field="--resume",
        fix=fix,
    )


def changes(planned: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What is different in the plan that a run goes on with, in a line each; none where it is the run's.

    Args:
        planned: The run's plan as plain data.
        wanted: The plan that it goes on with.
    """
    if planned["digest"] == wanted["digest"]:
        return []
    found = _compared(planned, wanted)
    return _listed(found.differences or found.labels)


def _compared(planned: Mapping[str, Any], wanted: Mapping[str, Any]) -> PlanDiff:
    return compare(*(Side(given="", kind="plan", digest=plan["digest"], plan=plan) for plan in (planned, wanted)))


def _listed(items: Iterable[Difference]) -> list[str]:
    return [f"{item.path}: {item.a!r} in the run, {item.b!r} here" for item in items]


def _may_change(path: str) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in MAY_CHANGE)
