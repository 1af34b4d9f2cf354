"""What a matrix says: each cell over its seeds and against the baseline, the effect of each factor, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megacpp_stp.ablate.cells import PlannedRun
from megacpp_stp.ablate.code import require_one_code
from megacpp_stp.ablate.contrast import Contrast, Runs, contrast
from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.ablate.words import sentence_words
from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.bootstrap import FEWEST_SEEDS
from megacpp_stp.runs.files import shown_lines
from megacpp_stp.runs.invalid import invalid_reason
from megacpp_stp.runs.likeness import likeness
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.recorded import RecordedRun, read_run
from megacpp_stp.runs.window import Window, choose_window

_INVALID = " is INVALID: "


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One cell over the window.

    Attributes:
        name: The cell.
        is_baseline: Whether the others are compared with it.
        seeds: Of its complete runs.
        by_seed: Mean of the metric of each.
        mean: Over the seeds; None without a complete run.
        spread: Sample standard deviation over the seeds; None for fewer than two.
        parameters: Of the model; None where no run says.
        against_baseline: None for the baseline itself.
    """

    name: str
    is_baseline: bool
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    mean: float | None
    spread: float | None
    parameters: int | None
    against_baseline: Contrast | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The main effect of a factor: one level against the baseline's, mean over all levels of the other factors.

    Attributes:
        factor: Its name.
        level: The level.
        against: The baseline's level.
        contrast: Over all pairs of cells that differ in this factor alone.
    """

    factor: str
    level: str
    against: str
    contrast: Contrast


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Everything that a matrix says.

    Attributes:
        metric: What was compared.
        window: Where; None when there is no verdict.
        refused: Why there is no verdict at all; None when there is one.
        cells: In the order of the matrix.
        effects: Of each level but the baseline's, factor by factor.
        sentences: One a factor.
        missing: Runs that are not there or not complete, each with why.
        notes: What to bear in mind.
    """

    metric: str
    window: Window | None
    refused: str | None
    cells: tuple[CellResult, ...]
    effects: tuple[Effect, ...]
    sentences: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def invalid(self) -> tuple[str, ...]:
        """Of the missing: what a person has marked so, and nobody is to run again."""
        return tuple(line for line in self.missing if _INVALID in line)

    @property
    def open(self) -> tuple[str, ...]:
        """Of the missing: what `--resume` goes on with."""
        return tuple(line for line in self.missing if _INVALID not in line)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same runs."""
        window = self.window and {
            "first": self.window.first,
            "last": self.window.last,
            "iterations": len(self.window.iterations),
            "why": self.window.why,
        }
        return {**asdict(self), "window": window}


def judge_matrix(matrix: Matrix, planned: Sequence[PlannedRun]) -> Verdict:
    """Read what the runs left and say what it means. Only complete runs count."""
    runs, missing = complete_runs(planned)
    return judge_runs(matrix, runs, missing=missing)


def judge_runs(matrix: Matrix, runs: Runs, *, missing: Sequence[str]) -> Verdict:
    """Say what runs mean.

    Args:
        matrix: What was wanted.
        runs: Those that are complete, by cell and seed.
        missing: The others, each with why.
    """
    cells = [name_of(levels) for levels in matrix.cells()]
    try:
        values = {run: run.values_of(matrix.metric) for run in runs.values()}
        require_one_code(runs.values())
        _require_alike(runs)
        window = _window(matrix, runs, values)
    except UserError as error:
        return Verdict(
            metric=matrix.metric,
            window=None,
            refused=error.problem,
            cells=(),
            effects=(),
            sentences=(),
            missing=tuple(missing),
            notes=(),
        )
    effects = tuple(
        Effect(
            factor=factor,
            level=level,
            against=matrix.baseline[factor],
            contrast=contrast(_pairs(matrix, factor, level), runs, values=values, window=window),
        )
        for factor, levels in matrix.factors.items()
        for level in levels
        if level != matrix.baseline[factor]
    )
    return Verdict(
        metric=matrix.metric,
        window=window,
        refused=None,
        cells=tuple(_cell(name, matrix, runs, values=values, window=window) for name in cells),
        effects=effects,
        sentences=tuple(_sentences(matrix, effects)),
        missing=tuple(missing),
        notes=tuple(_notes(runs, effects, window=window)),
    )


def complete_runs(planned: Sequence[PlannedRun]) -> tuple[dict[tuple[str, int], RecordedRun], list[str]]:
    """Read the complete runs, by cell and seed, and say of each other one why it is none."""
    found, missing = {}, []
    for run in planned:
        if not run.directory.exists():
            missing.append(f"{run.name}: not run yet")
        elif (reason := invalid_reason(run.directory)) is not None:
            missing.append(f"{run.name}{_INVALID}{reason}")
        else:
            try:
                receipt = read_receipt(run.directory)
                if receipt["status"] == "complete":
                    found[run.cell, run.seed] = read_run(run.directory, name=run.name)
                else:
                    missing.append(f"{run.name} is incomplete: {shown_lines(receipt['reason'])}")
            except UserError as error:
                missing.append(f"{run.name} cannot be read: {error.field}: {error.problem}")
    return found, missing


def _require_alike(runs: Runs) -> None:
    """Refuse a cell whose seeds ran unlike: on two machines, say."""
    first: dict[str, RecordedRun] = {}
    for (cell, _), run in runs.items():
        like = likeness(first.setdefault(cell, run), run)
        if not like.in_seeds_alone:
            what = ", ".join([*like.unlike, *like.besides, *like.changed])
            raise UserError(f"{first[cell].name} and {run.name} differ in more than their seeds: {what}", field="RUN")


def _window(matrix: Matrix, runs: Runs, values: Mapping[RecordedRun, Mapping[int, float]]) -> Window:
    if not runs:
        raise UserError("no run is complete yet", field="RUN")
    common = sorted(set.intersection(*(set(found) for found in values.values())))
    # One run of each cell, whatever its seed: others of a cell differ from it in their seeds alone.
    cells = list({cell: run for (cell, _), run in runs.items()}.values())
    in_stp = any(likeness(cells[0], other).in_stp for other in cells[1:])
    return choose_window(common, runs=list(runs.values()), in_stp=in_stp, wanted=matrix.wanted)


def _pairs(matrix: Matrix, factor: str, level: str) -> list[tuple[str, str]]:
    """All cells with the baseline's level of a factor, and what they are with another."""
    return [
        (name_of(levels), name_of({**levels, factor: level}))
        for levels in matrix.cells()
        if levels[factor] == matrix.baseline[factor]
    ]


def _cell(
    name: str, matrix: Matrix, runs: Runs, *, values: Mapping[RecordedRun, Mapping[int, float]], window: Window
) -> CellResult:
    mine = {seed: run for (cell, seed), run in runs.items() if cell == name}
    means = tuple(
        math.fsum(values[run][i] for i in window.iterations) / len(window.iterations) for run in mine.values()
    )
    base = name_of({factor: matrix.baseline[factor] for factor in matrix.factors})
    mean = math.fsum(means) / len(means) if means else None
    spread = None
    if mean is not None and len(means) > 1:
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1))
    counts = [value_at(run.receipt, ["parameters", "total"]) for run in mine.values()]
    return CellResult(
        name=name,
        is_baseline=name == base,
        seeds=tuple(mine),
        by_seed=means,
        mean=mean,
        spread=spread,
        parameters=next((count for count in counts if type(count) is int), None),
        against_baseline=None if name == base else contrast([(base, name)], runs, values=values, window=window),
    )


def _sentences(matrix: Matrix, effects: Sequence[Effect]) -> Iterator[str]:
    for factor in matrix.factors:
        mine = [effect for effect in effects if effect.factor == factor]
        if mine:
            clauses = [
                f"{effect.level} against {effect.against} {sentence_words(effect.contrast, metric=matrix.metric)}"
                for effect in mine
            ]
            yield f"{factor}: {'; '.join(clauses)}."


def _notes(runs: Runs, effects: Sequence[Effect], *, window: Window) -> Iterator[str]:
    counts = [len(effect.contrast.seeds) for effect in effects if effect.contrast.refused is None]
    if counts and min(counts) < FEWEST_SEEDS:
        yield "an interval over iterations says nothing of other seeds; name three or more for that"
    if len(counts) > 1:
        yield f"{len(counts)} levels are judged, and no interval is widened for their number"
    for effect in effects:
        signs = {math.copysign(1.0, value) for value in effect.contrast.by_pair}
        if len(signs) > 1:
            yield f"{effect.factor} {effect.level}: its sign is not the same in all cells, see their table"
    for cell in dict.fromkeys(cell for cell, _ in runs):
        run = next(run for (its, _), run in runs.items() if its == cell)
        regimes = {} if run.gate is None or not run.gate.acts else run.gate.regimes(window.iterations)
        if len(regimes) > 1 or "dormant" in regimes:
            yield f"{cell}: the iterations are " + ", ".join(f"{count} {regime}" for regime, count in regimes.items())
