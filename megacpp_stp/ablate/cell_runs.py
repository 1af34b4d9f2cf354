"""The runs of a matrix as a report shows runs: an arm for each cell that may be compared with the baseline.

Window, differences and intervals are the verdict's: nothing is judged a second time here.
"""

from __future__ import annotations

from dataclasses import replace
from string import ascii_uppercase

from megacpp_stp.ablate.contrast import Contrast, Runs
from megacpp_stp.ablate.matrix import Matrix
from megacpp_stp.ablate.verdict import Verdict
from megacpp_stp.runs.arms import Arm, Pairing
from megacpp_stp.runs.compare import Comparison, PairResult, result_of
from megacpp_stp.runs.likeness import likeness
from megacpp_stp.runs.report import Report

MOST_ARMS = len(ascii_uppercase)


def report_of(matrix: Matrix, runs: Runs, verdict: Verdict, *, title: str) -> Report | None:
    """What a report needs.

    Args:
        matrix: What was wanted.
        runs: Complete runs, by cell and seed.
        verdict: What they say.
        title: Of the page.

    Returns:
        None where no cell may be compared with the baseline, or more than `MOST_ARMS` would be shown.
    """
    cells = shown_cells(verdict)
    if verdict.window is None or len(cells) < 2 or len(cells) > MOST_ARMS:
        return None
    # An arm is called as its cell; the seeds have a column of their own.
    by_cell = {
        name: {seed: replace(run, name=name) for (cell, seed), run in runs.items() if cell == name} for name in cells
    }
    arms = [
        Arm(letter=letter, runs=tuple(mine.values()))
        for letter, mine in zip(ascii_uppercase, by_cell.values(), strict=False)
    ]
    base, *others = arms
    found = {cell.name: cell.against_baseline for cell in verdict.cells}
    pairs, pairings = [], []
    for name, arm in zip(cells[1:], others, strict=True):
        contrast = found[name]
        assert contrast is not None
        partners = tuple((by_cell[cells[0]][seed], by_cell[name][seed]) for seed in contrast.seeds)
        pairings.append(Pairing(pairs=partners, left_out=(), same_seeds=True))
        pairs.append(_pair(base, arm, contrast))
    results = tuple(
        result_of(arm, run, metric=matrix.metric, values=run.values_of(matrix.metric), window=verdict.window)
        for arm in arms
        for run in arm.runs
    )
    comparison = Comparison(
        title=title,
        metric=matrix.metric,
        window=verdict.window,
        runs=results,
        pairs=tuple(pairs),
        notes=verdict.notes,
    )
    return Report(
        title=title,
        metric=matrix.metric,
        window=verdict.window,
        arms=tuple(arms),
        results=results,
        comparison=comparison,
        pairings=tuple(pairings),
        invalid=(),
    )


def shown_cells(verdict: Verdict) -> list[str]:
    """The baseline and the cells that may be compared with it, in this order; empty without a run of the baseline."""
    base = next((cell for cell in verdict.cells if cell.is_baseline and cell.seeds), None)
    if base is None:
        return []
    others = (
        cell.name
        for cell in verdict.cells
        if cell.against_baseline is not None and cell.against_baseline.refused is None
    )
    return [base.name, *others]


def _pair(base: Arm, arm: Arm, found: Contrast) -> PairResult:
    assert found.difference is not None and found.within is not None
    like = likeness(base.runs[0], arm.runs[0])
    return PairResult(
        a=base.letter,
        b=arm.letter,
        controlled=found.controlled,
        standing=found.standing,
        differences=tuple({"path": item.path, "a": item.a, "b": item.b} for item in like.differences),
        unlike=like.unlike,
        seeds=found.seeds,
        by_seed=found.by_seed,
        difference=found.difference,
        relative=found.relative,
        interval=found.interval,
        method=found.method,
        verdict=found.within,
    )
