"""What a report shows: runs side by side, what sets them apart, and one run alone. docs/report.md says it for users.

What may be compared, where, and how sure it is, is `megacpp_stp.runs.compare`'s to say, and is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.runs.arms import Arm, Pairing, make_arms, pair_seeds
from megacpp_stp.runs.compare import Comparison, RunResult, compare_runs, read_runs, result_of
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.gate import Gate
from megacpp_stp.runs.invalid import invalid_reason, require_valid
from megacpp_stp.runs.metrics import UNITS
from megacpp_stp.runs.recorded import RecordedRun, read_run
from megacpp_stp.runs.window import Wanted, Window, choose_window

WORDS = {"lm_loss": "lm loss", "bits_per_byte": "lm loss"}
_LARGEST = 1e18  # beyond, axes of floats lose their way
_LAST_ITERATION = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalid:
    """A run that was named and is left out.

    Attributes:
        name: Its directory's name.
        reason: What a person said of it.
        was_base: Whether it was named first, as what others compare with.
    """

    name: str
    reason: str
    was_base: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything on the page.

    Attributes:
        title: With the labels that a reader must not miss.
        metric: Name of the loss: ``lm_loss`` or ``bits_per_byte``.
        window: What tables and differences are about.
        arms: Runs that are shown; those that differ in their seeds alone are one arm.
        results: Of each of these runs over the window, arm by arm.
        comparison: None for one run alone.
        pairings: Of each arm after the first with the first, as compared; empty for one run alone.
        invalid: Runs that are left out.
    """

    title: str
    metric: str
    window: Window
    arms: tuple[Arm, ...]
    results: tuple[RunResult, ...]
    comparison: Comparison | None
    pairings: tuple[Pairing, ...]
    invalid: tuple[Invalid, ...]

    @property
    def runs(self) -> tuple[RecordedRun, ...]:
        """All runs, in the order of `results`."""
        return tuple(run for arm in self.arms for run in arm.runs)

    @property
    def is_loud(self) -> bool:
        """Whether the title holds a warning."""
        return self.comparison is not None and not all(pair.controlled for pair in self.comparison.pairs)

    @cached_property
    def values(self) -> Mapping[RecordedRun, Mapping[int, float]]:
        """The metric by run and iteration."""
        return {run: values_of(run, self.metric) for run in self.runs}

    @cached_property
    def evaluations(self) -> Mapping[RecordedRun, Sequence[tuple[int, float]]]:
        """Iteration and metric of each evaluation by run; the last iteration of a run may have two."""
        found = {}
        for run in self.runs:
            points = tuple((record["iteration"], record[self.metric]) for record in run.validation)
            for iteration, value in points:
                _usable({iteration: value}, run, self.metric)
            found[run] = points
        return found

    @cached_property
    def last_iteration(self) -> int:
        """Of any run."""
        return max(run.last_iteration for run in self.runs)

    @cached_property
    def gates(self) -> tuple[tuple[Arm, Gate | None], ...]:
        """STP's schedule of each arm."""
        return tuple((arm, arm.runs[0].gate) for arm in self.arms)

    def mean_of(self, arm: Arm) -> dict[int, float]:
        """The metric by iteration, mean over an arm's seeds, where each has it."""
        return _mean_over([self.values[run] for run in arm.runs])

    def differences(self, pairing: Pairing) -> dict[int, float]:
        """Other minus base by iteration, mean over the pairs, where each has it: what the window's mean is made of."""
        sides = [(self.values[a], self.values[b]) for a, b in pairing.pairs]
        return _mean_over([{i: right[i] - left[i] for i in left if i in right} for left, right in sides])


def build_report(
    directories: Sequence[Path], *, metric: str = "lm_loss", window: Wanted | None = None, allow_unlike: bool = False
) -> Report:
    """Read runs and put together what is to be shown of them.

    Args:
        directories: Run directories; the first that is not INVALID is of the base.
        metric: ``lm_loss`` or ``bits_per_byte``.
        window: The iterations; None for those in which what differs acts.
        allow_unlike: As in `compare_runs`.

    Raises:
        UserError: What `compare_runs` refuses, in its words; or no run is left.
    """
    if metric not in UNITS:
        raise UserError(
            "is no loss that a report is about", field="--metric", value=metric, fix=f"choose one of {', '.join(UNITS)}"
        )
    reasons = [invalid_reason(directory) for directory in directories]
    valid = [directory for directory, reason in zip(directories, reasons, strict=True) if reason is None]
    if not valid:
        require_valid(directories[0])
    invalid = tuple(
        Invalid(name=shown(directory.resolve().name), reason=reason, was_base=place == 0)
        for place, (directory, reason) in enumerate(zip(directories, reasons, strict=True))
        if reason is not None
    )
    if len(valid) == 1:
        return _of_one(valid[0], metric=metric, window=window, invalid=invalid)
    found = compare_runs(valid, metric=metric, window=window, allow_unlike=allow_unlike)
    base, *others = make_arms(read_runs(valid))
    pairings = tuple(pair_seeds(base, arm) for arm in others)
    used = {run for pairing in pairings for pair in pairing.pairs for run in pair}
    return Report(
        title=found.title,
        metric=metric,
        window=found.window,
        arms=tuple(
            Arm(letter=arm.letter, runs=tuple(run for run in arm.runs if run in used)) for arm in (base, *others)
        ),
        results=found.runs,
        comparison=found,
        pairings=pairings,
        invalid=invalid,
    )


def _of_one(directory: Path, *, metric: str, window: Wanted | None, invalid: tuple[Invalid, ...]) -> Report:
    run = read_run(directory, name=directory.resolve().name)
    values = run.values_of(metric)
    arrived = run.gate is not None and run.gate.acts and run.last_iteration >= run.gate.first_live
    chosen = choose_window(sorted(values), runs=[run], in_stp=arrived, wanted=window)
    if window is None and not arrived:
        chosen = Window(iterations=chosen.iterations, why="all of the run")
    arm = Arm(letter="A", runs=(run,))
    return Report(
        title=f"{shown(run.receipt['recipe']['name'])}: one run, {run.name}",
        metric=metric,
        window=chosen,
        arms=(arm,),
        results=(result_of(arm, run, metric=metric, values=values, window=chosen),),
        comparison=None,
        pairings=(),
        invalid=invalid,
    )


def values_of(run: RecordedRun, name: str) -> dict[int, float]:
    """A value by iteration; empty for a run that has none.

    Raises:
        UserError: It is no number somewhere, or none that could be drawn.
    """
    if all(record.get(name) is None for record in run.records):
        return {}
    return _usable(run.values_of(name), run, name)


def _usable(values: dict[int, float], run: RecordedRun, name: str) -> dict[int, float]:
    for iteration, value in values.items():
        if abs(value) > _LARGEST or not 0 <= iteration < _LAST_ITERATION:
            raise UserError(
                f"{name} {value:.3g} of iteration {iteration} is nothing that a run measures",
                field=shown(run.directory),
                fix="its files are damaged; use another run",
            )
    return values


def _mean_over(series: Sequence[Mapping[int, float]]) -> dict[int, float]:
    common = sorted(set.intersection(*(set(values) for values in series)))
    return {i: math.fsum(values[i] for values in series) / len(series) for i in common}
