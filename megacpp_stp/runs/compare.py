"""Comparing runs by what they recorded, where what differs between them acts. docs/compare.md says it for users.

Arm A is the base; each other arm is compared with it, iteration by iteration and seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.arms import Arm, Pairing, make_arms, pair_seeds
from megacpp_stp.runs.bootstrap import FEWEST_SEEDS, Interval
from megacpp_stp.runs.difference import counted, interval_of, mean, relative_to, shown_by
from megacpp_stp.runs.files import shown_lines
from megacpp_stp.runs.likeness import Likeness, arm_likeness, some, standing
from megacpp_stp.runs.recorded import RecordedRun, read_run
from megacpp_stp.runs.window import Wanted, Window, choose_window, require_live

COMPARE_FORMAT = 1
_HIGHER_IS_BETTER = ("tokens_per_s", "tflops_per_gpu", "mfu", "goodput")
_LOWER_IS_BETTER = ("lm_loss", "bits_per_byte", "stp_loss", "stp_weighted", "stp_loss_by_tap", "step_time_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value and the iteration that it is of."""

    value: float
    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run over the window.

    Attributes:
        arm: Letter of its arm.
        name: Its directory's own name; the whole path where two have the same.
        seed: Of its training.
        status: ``complete`` or ``incomplete``.
        stp_weight: Of its STP; None for a run without.
        gate: First iteration with the STP term; None where it never has one.
        regimes: How many iterations of the window are dormant, warming and active; empty without STP.
        mean: Of the metric.
        best: Best value of the metric; None where neither more nor less is better.
        last: At the end of the window.
        best_validation: Lowest validation loss in the window, in the unit of `validation_of`; None when nothing was
            evaluated there.
    """

    arm: str
    name: str
    seed: int | None
    status: str
    stp_weight: float | None
    gate: int | None
    regimes: dict[str, int]
    mean: float
    best: Point | None
    last: Point
    best_validation: Point | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairResult:
    """One arm against the base.

    Attributes:
        a: Letter of the base.
        b: Letter of the other arm.
        controlled: Whether the plans of each pair differ in ``stp.*`` alone.
        standing: The same in words, with what differs.
        differences: Each leaf that differs: path, a, b.
        unlike: Kinds that differ and were allowed to, each with what it is.
        seeds: Seeds that were paired.
        by_seed: Mean difference of each pair, other minus base.
        difference: Their mean.
        relative: The same over the base's mean; None where that is 0.
        interval: Of the difference; None where there is too little to say.
        method: What the interval is over, in words.
        verdict: ``lower``, ``higher``, ``no difference shown`` or ``no interval``.
    """

    a: str
    b: str
    controlled: bool
    standing: str
    differences: tuple[dict[str, Any], ...]
    unlike: Mapping[str, tuple[str, ...]]
    seeds: tuple[int | None, ...]
    by_seed: tuple[float, ...]
    difference: float
    relative: float | None
    interval: Interval | None
    method: str
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that `runs compare` says.

    Attributes:
        title: With the labels that a reader must not miss.
        metric: What was compared.
        window: Where.
        runs: Each run, arm by arm.
        pairs: Each arm against the first.
        notes: What to bear in mind.
    """

    title: str
    metric: str
    window: Window
    runs: tuple[RunResult, ...]
    pairs: tuple[PairResult, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same runs."""
        return {
            "compare_format": COMPARE_FORMAT,
            "title": self.title,
            "metric": self.metric,
            "window": {
                "first": self.window.first,
                "last": self.window.last,
                "iterations": len(self.window.iterations),
                "why": self.window.why,
            },
            "runs": [asdict(run) for run in self.runs],
            "pairs": [asdict(pair) for pair in self.pairs],
            "notes": list(self.notes),
        }


def read_runs(directories: Sequence[Path]) -> list[RecordedRun]:
    """Read runs that are to be compared.

    Raises:
        UserError: Fewer than two, one named twice, one that is INVALID or damaged.
    """
    if len(directories) < 2:
        raise UserError("one run compares with nothing", field="RUN", fix="name two runs or more")
    places = [directory.resolve() for directory in directories]
    for place, directory in zip(places, directories, strict=True):
        if places.count(place) > 1:
            raise UserError("is named twice", field="RUN", value=str(directory), fix="name each run once")
    names = [place.name for place in places]
    return [
        read_run(directory, name=name if names.count(name) == 1 else str(directory))
        for directory, name in zip(directories, names, strict=True)
    ]


def compare_runs(
    directories: Sequence[Path], *, metric: str = "lm_loss", window: Wanted | None = None, allow_unlike: bool = False
) -> Comparison:
    """Compare runs over the iterations in which what differs between them acts.

    Args:
        directories: Run directories; the first is of the base.
        metric: See `RecordedRun.values_of`.
        window: The iterations; None for those in which STP has all of its weight, where the runs differ in STP.
        allow_unlike: Compare runs of unlike substrate, pattern, data, tokenizer, parallelism or batch, and say so.

    Raises:
        UserError: Runs that cannot be read or must not be compared; the fix says what would do.
    """
    base, *others = make_arms(read_runs(directories))
    pairings = [pair_seeds(base, arm) for arm in others]
    likes = [arm_likeness(*zip(*pairing.pairs, strict=True)) for pairing in pairings]
    if not allow_unlike:
        _refuse_unlike(pairings, likes, metric=metric)
    used = list(dict.fromkeys(run for pairing in pairings for pair in pairing.pairs for run in pair))
    values = {run: run.values_of(metric) for run in used}
    common = sorted(set.intersection(*(set(found) for found in values.values())))
    chosen = choose_window(common, runs=used, in_stp=any(like.in_stp for like in likes), wanted=window)
    for arm, like in zip(others, likes, strict=True):
        acts = any(run.gate is not None and run.gate.acts for run in (base.runs[0], arm.runs[0]))
        if like.in_stp and (acts or not like.besides):
            require_live(chosen, runs=(base.runs[0], arm.runs[0]))
    pairs = tuple(
        _compare_arms(base, arm, pairing=pairing, like=like, values=values, window=chosen)
        for arm, pairing, like in zip(others, pairings, likes, strict=True)
    )
    arms = [base, *others]
    return Comparison(
        title=_title(pairs, metric=metric, window=chosen),
        metric=metric,
        window=chosen,
        runs=tuple(
            result_of(arm, run, metric=metric, values=values[run], window=chosen)
            for arm in arms
            for run in arm.runs
            if run in values
        ),
        pairs=pairs,
        notes=tuple(_notes(pairings, used, values=values, window=chosen)),
    )


def _refuse_unlike(pairings: Sequence[Pairing], likes: Sequence[Likeness], *, metric: str) -> None:
    for pairing, like in zip(pairings, likes, strict=True):
        if like.unlike:
            a, b = pairing.pairs[0]
            what = "; ".join(f"{kind} ({some(paths)})" for kind, paths in like.unlike.items())
            bits = "; losses a token of two tokenizers are no one scale, compare bits_per_byte"
            raise UserError(
                f"{a.name} and {b.name} are unlike in {what}",
                field="RUN",
                fix="compare runs that share these, or add --allow-unlike: the title will say so"
                + (bits if "tokenizer" in like.unlike and metric != "bits_per_byte" else ""),
            )


def _compare_arms(
    base: Arm,
    arm: Arm,
    *,
    pairing: Pairing,
    like: Likeness,
    values: Mapping[RecordedRun, Mapping[int, float]],
    window: Window,
) -> PairResult:
    by_pair = [[values[b][i] - values[a][i] for i in window.iterations] for a, b in pairing.pairs]
    by_seed = tuple(map(mean, by_pair))
    difference = mean(by_seed)
    base_mean = mean([values[a][i] for a, _ in pairing.pairs for i in window.iterations])
    interval, method = interval_of(by_pair)
    return PairResult(
        a=base.letter,
        b=arm.letter,
        controlled=like.is_controlled and pairing.same_seeds,
        standing=standing([like], same_seeds=pairing.same_seeds),
        differences=tuple({"path": item.path, "a": item.a, "b": item.b} for item in like.differences),
        unlike=like.unlike,
        seeds=tuple(a.seed for a, _ in pairing.pairs),
        by_seed=by_seed,
        difference=difference,
        relative=relative_to(base_mean, difference),
        interval=interval,
        method=method,
        verdict=shown_by(interval),
    )


def _title(pairs: Sequence[PairResult], *, metric: str, window: Window) -> str:
    unlike = list(dict.fromkeys(kind for pair in pairs for kind in pair.unlike))
    if unlike:
        label = f"UNLIKE RUNS ({', '.join(unlike)})"
    else:
        label = "controlled comparison" if all(pair.controlled for pair in pairs) else "NOT CONTROLLED"
    return f"{label}: {metric}, iterations {window.first} to {window.last}"


def validation_of(metric: str) -> str:
    """What evaluations are shown of beside a metric: the same loss, or lm_loss beside what is none."""
    return metric if metric == "bits_per_byte" else "lm_loss"


def result_of(arm: Arm, run: RecordedRun, *, metric: str, values: Mapping[int, float], window: Window) -> RunResult:
    """One run over the window.

    Args:
        arm: That it is of.
        run: The run.
        metric: What is compared.
        values: The metric by iteration.
        window: The iterations.
    """
    inside = [Point(value=values[i], iteration=i) for i in window.iterations]
    name = validation_of(metric)
    validations = [
        Point(value=record[name], iteration=record["iteration"])
        for record in run.validation
        if record[name] is not None and window.first <= record["iteration"] <= window.last
    ]
    return RunResult(
        arm=arm.letter,
        name=run.name,
        seed=run.seed,
        status=run.receipt["status"],
        stp_weight=None if run.gate is None else run.gate.weight,
        gate=run.gate.first_live if run.gate is not None and run.gate.acts else None,
        regimes={} if run.gate is None else run.gate.regimes(window.iterations),
        mean=mean([point.value for point in inside]),
        best=_best(metric, inside),
        last=inside[-1],
        best_validation=min(validations, key=lambda point: point.value, default=None),
    )


def _best(metric: str, points: Sequence[Point]) -> Point | None:
    """The earliest of the best."""
    name = metric.partition(".")[0]
    if name in _LOWER_IS_BETTER:
        return min(points, key=lambda point: point.value)
    return max(points, key=lambda point: point.value) if name in _HIGHER_IS_BETTER else None


def _notes(
    pairings: Sequence[Pairing],
    used: Sequence[RecordedRun],
    *,
    values: Mapping[RecordedRun, Mapping[int, float]],
    window: Window,
) -> Iterator[str]:
    for run in dict.fromkeys(run for pairing in pairings for run in pairing.left_out):
        if run not in used:
            yield f"{run.name} (seed {run.seed}) has no partner of its seed: left out"
    if any(not pairing.same_seeds for pairing in pairings):
        yield "seeds differ within a pair: the two runs read other batches in an iteration"
    seeds = [len(pairing.pairs) for pairing in pairings]
    if min(seeds) < FEWEST_SEEDS:
        yield "an interval over iterations says nothing of other seeds; name three or more of each arm for that"
    for run in used:
        if not run.is_complete:
            yield f"{run.name} is incomplete: {shown_lines(run.receipt['reason'] or 'it does not say why')}"
        regimes = {} if run.gate is None or not run.gate.acts else run.gate.regimes(window.iterations)
        if len(regimes) > 1 or "dormant" in regimes:
            parts = ", ".join(f"{count} {regime}" for regime, count in regimes.items())
            yield f"{run.name}: the iterations are {parts}"
        missing = sum(1 for i in _iterations(run, window) if i not in values[run])
        if missing:
            yield f"{run.name} has no value in {counted(missing)} of the window: left out"


def _iterations(run: RecordedRun, window: Window) -> list[int]:
    return [record["iteration"] for record in run.records if window.first <= record["iteration"] <= window.last]
