"""How quick the planner is, as a whole process: what an engineer waits for at the prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megacpp_stp.bench.processes import Timing, time_in_turns

LARGEST_RATIO = 2.5
"""Of ``plan --format argv`` to importing the libraries that it is made of."""

LONGEST_CHECK_S = 10.0
_BASELINE = "import pydantic, yaml, typer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBench:
    """Timings of one run.

    Attributes:
        recipe: What was planned.
        baseline: ``python -c "import pydantic, yaml, typer"``.
        plan: ``plan RECIPE --format argv``.
        check: ``check RECIPE``; None where it was left out.
    """

    recipe: str
    baseline: Timing
    plan: Timing
    check: Timing | None

    @property
    def ratio(self) -> float:
        """Plan over baseline: the median of the rounds' own ratios."""
        pairs = zip(self.plan.seconds, self.baseline.seconds, strict=True)
        return Timing(seconds=tuple(plan / baseline for plan, baseline in pairs)).median

    @property
    def within_targets(self) -> bool:
        """Whether both targets are met, of those that were measured."""
        return self.ratio <= LARGEST_RATIO and (self.check is None or self.check.median <= LONGEST_CHECK_S)


def measure(recipe: str, *, rounds: int, with_check: bool) -> PlanBench:
    """Time the planner on a recipe.

    Args:
        recipe: Name or path.
        rounds: Counted rounds of baseline and plan; check takes seconds and gets 3 at most.
        with_check: Whether to time ``check`` too, which needs megatron-core.

    Raises:
        UserError: A command that fails.
    """
    program = [sys.executable, "-m", "megacpp_stp"]
    quick = time_in_turns(
        {
            "baseline": [sys.executable, "-c", _BASELINE],
            "plan": [*program, "plan", recipe, "--format", "argv"],
        },
        rounds=rounds,
    )
    check = None
    if with_check:
        check = time_in_turns({"check": [*program, "check", recipe]}, rounds=min(rounds, 3))["check"]
    return PlanBench(recipe=recipe, baseline=quick["baseline"], plan=quick["plan"], check=check)
