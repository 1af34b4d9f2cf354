"""One thing of a matrix against another: a cell against the baseline, or a level against a level in all cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.facts import Side
from megacpp_stp.runs.bootstrap import FEWEST_SEEDS, Interval, block_interval, seed_interval
from megacpp_stp.runs.compare import counted
from megacpp_stp.runs.likeness import Likeness, likeness
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.window import Window, require_live

BETTER, WORSE, UNKNOWN = "better", "worse", "cannot be told"
NO_VERDICT = "no verdict over seeds"
LOWER, HIGHER = "lower", "higher"
Runs = Mapping[tuple[str, int], RecordedRun]
_MOST_NAMED = 6


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
    by_seed = tuple(_mean([_mean(one) for one in row]) for row in series)
    difference = _mean(by_seed)
    base = _mean([values[a][i] for row in matched for a, _ in row for i in window.iterations])
    interval, method = interval_of([[_mean(column) for column in zip(*row, strict=True)] for row in series])
    within = _within(interval)
    return Contrast(
        pairs=tuple(pairs),
        verdict=_verdict(within, seeds=len(seeds)),
        within=within,
        seeds=tuple(seeds),
        by_seed=by_seed,
        by_pair=tuple(_mean([_mean(row[place]) for row in series]) for place in range(len(pairs))),
        difference=difference,
        relative=_over(difference, base),
        interval=interval,
        method=method,
        controlled=all(like.is_controlled for like in likes),
        standing=_standing(likes),
    )


def interval_of(by_seed: Sequence[Sequence[float]]) -> tuple[Interval | None, str]:
    """The interval of a mean difference, by the rule of `runs compare`.

    Args:
        by_seed: Differences by seed and iteration.

    Returns:
        The interval and what it is over: seeds, where there are enough; else blocks of iterations of their mean.
    """
    seeds = len(by_seed)
    if seeds >= FEWEST_SEEDS:
        return seed_interval([_mean(one) for one in by_seed]), f"Student's t over {seeds} seeds"
    averaged = [_mean(column) for column in zip(*by_seed, strict=True)]
    found = block_interval(averaged)
    of = "1 seed" if seeds == 1 else f"the mean of {seeds} seeds"
    if found is None:
        return None, f"{counted(len(averaged))} of {of}, too few for one"
    return found, f"moving blocks of {found.block_length}, over {counted(len(averaged))} of {of}"


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
                f"the runs are unlike in {kind}, and not because of the matrix: {_some(unasked)}",
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


def _standing(likes: Sequence[Likeness]) -> str:
    """Of all pairs together."""
    unlike = list(dict.fromkeys(kind for like in likes for kind in like.unlike))
    if unlike:
        return f"not controlled, unlike {', '.join(unlike)}"
    if not all(like.complete for like in likes):
        return "not controlled: a plan.json is missing, so that not all could be compared"
    changed = list(dict.fromkeys(name for like in likes for name in like.changed))
    if changed:
        return f"not controlled: {_some(changed)} went on with another plan"
    besides = list(dict.fromkeys(path for like in likes for path in like.besides))
    if besides:
        return f"not controlled: {_some(besides)} {'differs' if len(besides) == 1 else 'differ'}"
    paths = list(dict.fromkeys(_stp_paths(likes)))
    return f"controlled: only {_some(paths)} {'differs' if len(paths) == 1 else 'differ'}"


def _stp_paths(likes: Sequence[Likeness]) -> Iterator[str]:
    for like in likes:
        lacks_stp = any(item.path == "stp.weight" and None in (item.a, item.b) for item in like.differences)
        yield from ["stp"] if lacks_stp else like.paths


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _within(interval: Interval | None) -> str:
    if interval is None:
        return "no interval"
    if interval.high < 0:
        return LOWER
    return HIGHER if interval.low > 0 else "no difference shown"


def _verdict(within: str, *, seeds: int) -> str:
    """Of the levels. An interval over iterations is of these runs alone, and no level is better by it."""
    if seeds < FEWEST_SEEDS:
        return NO_VERDICT
    return {LOWER: BETTER, HIGHER: WORSE}.get(within, UNKNOWN)


def _over(difference: float, mean: float) -> float | None:
    relative = difference / abs(mean) if mean else math.inf
    return relative if math.isfinite(relative) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
