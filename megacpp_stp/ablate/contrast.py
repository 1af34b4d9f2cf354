"""One thing of a matrix against another: a cell against the baseline, or a level against a level in all cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.facts import Side
from megacpp_stp.runs.bootstrap import FEWEST_SEEDS, Interval
from megacpp_stp.runs.difference import HIGHER, LOWER, interval_of, mean, relative_to, shown_by
from megacpp_stp.runs.likeness import Likeness, likeness, some, standing
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.window import Window, require_live

BETTER, WORSE, UNKNOWN = "better", "worse", "cannot be told"
NO_VERDICT = "no verdict over seeds"
Runs = Mapping[tuple[str, int], RecordedRun]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """What a matrix says of one thing against another. Differences are other minus base; less is better.

    Attributes:
        pairs: Cells, base and other, over which the difference is a mean.
        verdict: ``better``, ``worse`` or ``cannot be told``; ``no verdict over seeds`` where there are too few of them.
        within: What the interval says of these runs, as `runs compare` does: ``lower``, ``higher``,
            ``no difference shown`` or ``no interval``; None where nothing was computed.
        refused: Why nothing was computed; None when it was. Then all numbers are None.
        seeds: Seeds for which all runs are complete.
        by_seed: Difference of each: mean over pairs and iterations.
        by_pair: Difference of each pair: mean over seeds and iterations.
        difference: Mean of `by_seed`.
        relative: The same over the base's mean; None where that is 0.
        interval: Of the difference; None where there is too little to say.
        method: What the interval is over, in words.
        controlled: Whether the plans of each pair differ in ``stp.*`` alone.
        standing: The same in words, with what differs.
    """

    pairs: tuple[tuple[str, str], ...]
    verdict: str
    within: str | None = None
    refused: str | None = None
    seeds: tuple[int, ...] = ()
    by_seed: tuple[float, ...] = ()
    by_pair: tuple[float, ...] = ()
    difference: float | None = None
    relative: float | None = None
    interval: Interval | None = None
    method: str = ""
    controlled: bool = False
    standing: str = ""


def contrast(
    pairs: Sequence[tuple[str, str]],
    runs: Runs,
    *,
    values: Mapping[RecordedRun, Mapping[int, float]],
    window: Window,
) -> Contrast:
    """Compare cells pairwise, seed by seed, iteration by iteration.

    Args:
        pairs: Names of cells, base first.
        runs: Complete runs by cell and seed.
        values: The metric by run and iteration.
        window: The iterations.
    """
    cells = [cell for pair in pairs for cell in pair]
    seeds = [seed for seed in dict.fromkeys(seed for _, seed in runs) if all((cell, seed) in runs for cell in cells)]
    if not seeds:
        return Contrast(pairs=tuple(pairs), verdict=UNKNOWN, refused="no seed has all of these runs complete")
    matched = [[(runs[a, seed], runs[b, seed]) for a, b in pairs] for seed in seeds]
    try:
        likes = [judge(a, b, window=window) for row in matched for a, b in row]
    except UserError as error:
        return Contrast(pairs=tuple(pairs), verdict=UNKNOWN, refused=error.problem)
    series = [[[values[b][i] - values[a][i] for i in window.iterations] for a, b in row] for row in matched]
    by_seed = tuple(mean([mean(one) for one in row]) for row in series)
    difference = mean(by_seed)
    base = mean([values[a][i] for row in matched for a, _ in row for i in window.iterations])
    interval, method = interval_of([[mean(column) for column in zip(*row, strict=True)] for row in series])
    within = shown_by(interval)
    return Contrast(
        pairs=tuple(pairs),
        verdict=_verdict(within, seeds=len(seeds)),
        within=within,
        seeds=tuple(seeds),
        by_seed=by_seed,
        by_pair=tuple(mean([mean(row[place]) for row in series]) for place in range(len(pairs))),
        difference=difference,
        relative=relative_to(base, difference),
        interval=interval,
        method=method,
        controlled=all(like.is_controlled for like in likes),
        standing=standing(likes),
    )


def judge(a: RecordedRun, b: RecordedRun, *, window: Window) -> Likeness:
    """What differs between two runs.

    Raises:
        UserError: They may not be compared: unlike in more than the matrix asked for, or in STP where it acts in
            neither.
    """
    like = likeness(a, b)
    planned = _planned(a, b)
    for kind, paths in like.unlike.items():
        unasked = [path for path in paths if path not in planned]
        if unasked:
            raise UserError(
                f"the runs are unlike in {kind}, and not because of the matrix: {some(unasked)}",
                field="RUN",
                fix="run these again on one machine with the same data",
            )
    acts = any(run.gate is not None and run.gate.acts for run in (a, b))
    if like.in_stp and (acts or not like.besides):
        require_live(window, runs=(a, b))
    return like


def _planned(a: RecordedRun, b: RecordedRun) -> set[str]:
    """What differs between the plans alone: what the matrix asked for."""
    sides = [Side(given=run.name, kind="plan", digest=run.side.digest, plan=run.side.plan) for run in (a, b)]
    return {item.path for item in compare(*sides).differences} if all(side.plan for side in sides) else set()


def _verdict(within: str, *, seeds: int) -> str:
    """Of the levels. An interval over iterations is of these runs alone, and no level is better by it."""
    if seeds < FEWEST_SEEDS:
        return NO_VERDICT
    return {LOWER: BETTER, HIGHER: WORSE}.get(within, UNKNOWN)
