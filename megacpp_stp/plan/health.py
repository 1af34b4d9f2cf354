"""What ends a run while it runs: the options of Megatron that follow from ``training.health``, and what must hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.schema import Recipe

SLOW_MINUTES = 30.0
"""Minutes without progress that what happens once may take, where `hang_minutes` is less: starting, which compiles
kernels and indexes data, the whole first iteration, and saving a checkpoint."""

NO_CHECKS = "--no-check-for-nan-in-loss-and-grad"
_TIMEOUT = "distributed-timeout-minutes"


def slow_minutes(hang_minutes: float) -> float:
    """The limit of what happens once."""
    return max(SLOW_MINUTES, hang_minutes)


def meeting_seconds(hang_minutes: float) -> float:
    """How long the ranks of a run wait for each other before their first collective.

    A third of what start-up may take, which counts from before: so a rank that does not come is named as that, and no
    rank is taken to hang while it waits for it.
    """
    return 60.0 * slow_minutes(hang_minutes) / 3


def watched_minutes(hang_minutes: float) -> int:
    """Megatron's own limit on a rank with our watchdog: past a suspension of a week.

    A collective in flight counts the time in which its process was stopped, and would fail when that goes on. Without
    a watchdog, as under a script of one's own, the limit is the one in the arguments.
    """
    return math.ceil(slow_minutes(hang_minutes)) + 7 * 24 * 60


def check_health(recipe: Recipe) -> None:
    """Refuse a policy that says nothing, or two things.

    Raises:
        UserError: A count without steps to count, none where there are, or a second word on time-outs.
    """
    health, field = recipe.training.health, "training.health.most_skipped"
    if (health.nonfinite == "skip") != (health.most_skipped is not None):
        skips = health.nonfinite == "skip"
        raise UserError(
            "a run that skips steps must end when it skips nothing but steps" if skips else "nothing is skipped",
            field=field,
            value=health.most_skipped,
            fix="write a number, such as 10" if skips else "write null, or training.health.nonfinite: skip",
        )
    if _TIMEOUT in recipe.megatron:
        raise UserError(
            "would be a second word on how long a rank may wait",
            field=f"megatron.{_TIMEOUT}",
            value=recipe.megatron[_TIMEOUT],
            fix="leave it out, and set training.health.hang_minutes",
        )


def health_options(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options with their values, and the field of each."""
    health = recipe.training.health
    if health.nonfinite == "skip":
        # Upstream's checks end the run; ours see the same numbers at the same place (`training.gradients`).
        yield (NO_CHECKS,), "training.health.nonfinite"
    # Megatron's own limit ends a rank without a word of what it waited for, so it has to be the later one.
    minutes = math.ceil(slow_minutes(health.hang_minutes)) + 1
    yield (f"--{_TIMEOUT}", str(minutes)), "training.health.hang_minutes"
