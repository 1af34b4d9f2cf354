"""The cells of a matrix, and their runs: each with its plan, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import Device, RunPlan, build_plan
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.facts import Side
from megacpp_stp.recipe import Recipe, load_recipe, restore_recipe
from megacpp_stp.runs.bootstrap import FEWEST_SEEDS, FEWEST_VALUES
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.gate import DORMANT, Gate
from megacpp_stp.runs.likeness import SEEDS


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a matrix.

    Attributes:
        cell: Name of its cell.
        levels: Of each factor.
        seed: Of training and STP.
        plan: What runs.
        directory: Its run directory.
    """

    cell: str
    levels: dict[str, str]
    seed: int
    plan: RunPlan
    directory: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.cell} seed {self.seed}"

    @property
    def iterations(self) -> int:
        """That its plan asks for."""
        return self.plan.recipe.training.iterations

    @property
    def gate(self) -> Gate | None:
        """STP's schedule; None without STP."""
        stp = self.plan.recipe.stp
        if stp is None:
            return None
        return Gate(weight=stp.weight, start_step=stp.start_step, ramp_steps=stp.ramp_steps)


def plan_runs(matrix: Matrix, *, file: Path, device: Device, directory: Path) -> tuple[PlannedRun, ...]:
    """All runs in the order in which they are to run.

    All cells with the first seed, then all with the second: a matrix that was stopped half-way is balanced.

    Args:
        matrix: What is wanted.
        file: Where it was read from; its recipe may lie beside it.
        device: What the plans are for.
        directory: Of the matrix; each run gets CELL/SEED in it.

    Raises:
        UserError: A cell that cannot be planned, with its name and the field; cells that are one run; a window in
            which nothing that is compared acts, or that is too short for an interval.
    """
    recipes = {name_of(levels): _load(matrix, levels, file=file) for levels in matrix.cells()}
    runs = tuple(
        _plan_run(recipes[name_of(levels)], levels, seed=seed, device=device, directory=directory)
        for seed in matrix.seeds
        for levels in matrix.cells()
    )
    cells = runs[: len(runs) // len(matrix.seeds)]
    _refuse_same(cells)
    _refuse_dormant(cells, matrix)
    _refuse_too_few(cells, matrix)
    return runs


def processes_of(matrix: Matrix, *, file: Path) -> int:
    """The most that a cell has on one node.

    Raises:
        UserError: A cell that is no recipe, with its name.
    """
    return max(_load(matrix, levels, file=file).launch.processes_per_node for levels in matrix.cells())


def _load(matrix: Matrix, levels: dict[str, str], *, file: Path) -> Recipe:
    """A cell's recipe, seeds left out. It is a shipped one's name, or a path beside the matrix file."""
    is_path = "/" in matrix.recipe or matrix.recipe.endswith((".yaml", ".yml"))
    try:
        recipe = load_recipe(str(file.parent / matrix.recipe) if is_path else matrix.recipe, matrix.settings_of(levels))
        if recipe.launch.nodes > 1:
            raise UserError(
                "is more than one, and a matrix runs on this node",
                field="launch.nodes",
                value=recipe.launch.nodes,
                fix="launch runs on several nodes one by one, and use runs compare",
            )
    except UserError as error:
        raise of_cell(error, name_of(levels)) from None
    return recipe


def _plan_run(recipe: Recipe, levels: dict[str, str], *, seed: int, device: Device, directory: Path) -> PlannedRun:
    cell = name_of(levels)
    seeds = [f"training.seed={seed}", *([f"stp.seed={seed}"] if recipe.stp is not None else [])]
    try:
        plan = build_plan(restore_recipe(recipe.model_dump(mode="json"), seeds), device=device)
    except UserError as error:
        raise of_cell(error, cell) from None
    return PlannedRun(cell=cell, levels=levels, seed=seed, plan=plan, directory=directory / cell / str(seed))


def of_cell(error: UserError, name: str, *, fix: str | None = None) -> UserError:
    """The same mistake, with the cell or run in which it is."""
    where = f"cell {name}: {error.field}" if error.field else f"cell {name}"
    value = {} if error.value is None else {"value": error.value}
    return UserError(error.problem, field=where, fix=fix or error.fix, **value)


def differing(a: PlannedRun, b: PlannedRun) -> tuple[str, ...]:
    """What differs between two plans, by path, seeds left out."""
    sides = [Side(given=run.cell, kind="plan", digest=run.plan.digest, plan=run.plan.as_dict()) for run in (a, b)]
    return tuple(item.path for item in compare(*sides).differences if item.path not in SEEDS)


def _differ_in_stp(a: PlannedRun, b: PlannedRun) -> bool:
    return any(path == "stp" or path.startswith("stp.") for path in differing(a, b))


def _acts(run: PlannedRun) -> bool:
    gate = run.gate
    return gate is not None and gate.acts and gate.first_live <= run.iterations


def _refuse_same(cells: Sequence[PlannedRun]) -> None:
    """Refuse two cells that would be one run: a matrix counts them as two results."""
    for a, b in combinations(cells, 2):
        paths = differing(a, b)
        if not paths:
            why = "plan the same"
        elif all(path == "stp" or path.startswith("stp.") for path in paths) and not (_acts(a) or _acts(b)):
            why = "differ in STP alone, which acts in neither"
        else:
            continue
        raise UserError(
            f"{a.cell} and {b.cell} {why}: they are one run",
            field="factors",
            fix="choose levels so that each cell is another run; variants of STP and none at all can be one factor",
        )


def _refuse_dormant(cells: Sequence[PlannedRun], matrix: Matrix) -> None:
    """Refuse a matrix that could come to no verdict, before it takes hours."""
    wanted = matrix.wanted
    length = min(run.iterations for run in cells)
    for run in cells:
        gate = run.gate
        if wanted is None and gate is not None and gate.acts and gate.first_live > length:
            raise UserError(
                f"opens at iteration {gate.first_live}, and the runs have {length} in common: "
                "nothing could be compared",
                field=f"cell {run.cell}: stp.start_step",
                fix="open the gate earlier, or train longer",
            )
    if wanted is None:
        return
    first, last = wanted.first or 1, min(wanted.last or length, length)
    if first > length:
        raise UserError(
            f"begins after iteration {length}, the last that all runs have",
            field="window",
            value=matrix.window,
            fix="choose an earlier one, or train longer",
        )
    base = next(run for run in cells if run.levels == matrix.baseline)
    for run in cells:
        acting = [one.gate for one in (base, run) if one.gate is not None and one.gate.acts]
        if _differ_in_stp(base, run) and all(gate.regime_at(last) == DORMANT for gate in acting):
            opens = min((gate.first_live for gate in acting), default=None)
            raise UserError(
                f"lies wholly before the gate of {base.cell} and {run.cell}"
                + (f", which opens at iteration {opens}" if opens else ""),
                field="window",
                value=matrix.window,
                fix="choose a window after the gate, or write null for the one in which STP has all of its weight",
            )


def _refuse_too_few(cells: Sequence[PlannedRun], matrix: Matrix) -> None:
    """Refuse a matrix with too few seeds for an interval over them, and too few iterations for one over those."""
    if len(matrix.seeds) >= FEWEST_SEEDS:
        return
    wanted, last = matrix.wanted, min(run.iterations for run in cells)
    if wanted is not None:
        first, last = wanted.first or 1, min(wanted.last or last, last)
    else:
        first = _first_active(cells, last=last)
    count = last - first + 1
    if count >= FEWEST_VALUES:
        return
    seeds = f"{len(matrix.seeds)} seed{'s' if len(matrix.seeds) != 1 else ''}"
    raise UserError(
        f"{seeds} and {counted(count)}, {first} to {last}, to compare: no interval can be told from so few",
        field="seeds" if wanted is None else "window",
        value=list(matrix.seeds) if wanted is None else matrix.window,
        fix=f"name {FEWEST_SEEDS} seeds or more, or compare {FEWEST_VALUES} iterations or more"
        + (": train longer, or open the gate earlier" if wanted is None else ""),
    )


def _first_active(cells: Sequence[PlannedRun], *, last: int) -> int:
    """Where the window will begin that a matrix without one of its own is judged over."""
    gates = [run.gate for run in cells if run.gate is not None and run.gate.acts]
    if not gates or not any(_differ_in_stp(cells[0], run) for run in cells[1:]):
        return 1
    first = max(gate.first_active for gate in gates)
    return first if first <= last else max(gate.first_live for gate in gates)
