"""Runs put together: those that differ in their seeds alone are one arm, and arms are paired seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from megacpp_stp.errors import UserError
from megacpp_stp.runs.likeness import SEEDS, likeness, same_arm, some
from megacpp_stp.runs.recorded import RecordedRun


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One experiment, run with one seed or more.

    Attributes:
        letter: What the tables call it; A is what the others are compared with.
        runs: By seed.
    """

    letter: str
    runs: tuple[RecordedRun, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """Two arms, run by run.

    Attributes:
        pairs: A run of the first and its partner of the second.
        left_out: Runs without a partner.
        same_seeds: Whether partners have the same seed, and with it the same batches.
    """

    pairs: tuple[tuple[RecordedRun, RecordedRun], ...]
    left_out: tuple[RecordedRun, ...]
    same_seeds: bool


def make_arms(runs: Sequence[RecordedRun]) -> tuple[Arm, ...]:
    """Sort runs into arms, in the order in which they were named.

    Where all runs would be one arm there is nothing to compare but the seeds: then each run is an arm.

    Raises:
        UserError: Two runs of one arm have one seed, or there are too many arms.
    """
    groups: list[list[RecordedRun]] = []
    for run in runs:
        for group in groups:
            if same_arm(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    if len(groups) == 1:
        groups = [[run] for run in runs]
    if len(groups) > len(ascii_uppercase):
        raise UserError(
            f"{len(groups)} different runs are too many for one table",
            field="RUN",
            fix=f"compare at most {len(ascii_uppercase)}",
        )
    for group in groups:
        _check_seeds(group)
    return tuple(
        Arm(letter=letter, runs=tuple(sorted(group, key=lambda run: -1 if run.seed is None else run.seed)))
        for letter, group in zip(ascii_uppercase, groups, strict=False)
    )


def _check_seeds(group: Sequence[RecordedRun]) -> None:
    by_seed: dict[int | None, RecordedRun] = {}
    for run in group:
        if run.seed in by_seed:
            raise UserError(
                f"{by_seed[run.seed].name} and {run.name} are the same experiment with the same seed {run.seed}",
                field="RUN",
                fix="name one of them; `--assert-equal` tells whether they are equal",
            )
        by_seed[run.seed] = run


def pair_seeds(base: Arm, other: Arm) -> Pairing:
    """Partners by seed; two single runs are partners whatever their seeds are.

    Raises:
        UserError: Several seeds, and none in common.
    """
    if len(base.runs) == len(other.runs) == 1:
        pair = (base.runs[0], other.runs[0])
        return Pairing(pairs=(pair,), left_out=(), same_seeds=pair[0].seed == pair[1].seed)
    left, right = ({run.seed: run for run in arm.runs} for arm in (base, other))
    common = [seed for seed in left if seed in right]
    if not common:
        arms = [f"{arm.letter} ({', '.join(run.name for run in arm.runs)})" for arm in (base, other)]
        raise UserError(
            f"arms {' and '.join(arms)} have no seed in common; they are two arms because {_why_two(base, other)}",
            field="training.seed",
            value={arm.letter: [run.seed for run in arm.runs] for arm in (base, other)},
            fix="run both with the same seeds",
        )
    return Pairing(
        pairs=tuple((left[seed], right[seed]) for seed in common),
        left_out=tuple(run for run in (*base.runs, *other.runs) if run.seed not in common),
        same_seeds=True,
    )


def _why_two(base: Arm, other: Arm) -> str:
    """What differs between two arms besides seeds."""
    paths = [path for path in likeness(base.runs[0], other.runs[0]).paths if path not in SEEDS]
    if not paths:
        return "only one of them has its plan.json"
    return f"{some(paths)} differ{'s' if len(paths) == 1 else ''}"
