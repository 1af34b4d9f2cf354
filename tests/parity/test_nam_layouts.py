"""A NAM of every letter, with sparse attention and multi-token prediction, trains alike in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import Layout, run_ranks
from tests.parity.nam import ALL_LETTERS, NO_EXPERTS, Outcome, Training, part_of, train

ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")
TWO = ("launch.processes_per_node=2",)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layout; ``settings`` say it in the recipe, ``layout`` to the process groups."""

    name: str
    settings: tuple[str, ...]
    layout: Layout
    world: int = 2
    model: tuple[str, ...] = ALL_LETTERS
    quick: bool = False


CELLS = (
    Cell(name="PP2", settings=("parallel.stages=[6, 6]",), layout=Layout(pipeline=2), quick=True),
    Cell(
        name="PP2 x VPP2",
        settings=("parallel.virtual=2", "parallel.stages=[3, 3, 3, 3]"),
        layout=Layout(pipeline=2, virtual=2),
    ),
    Cell(
        name="TP2",
        settings=(*ONE, *TWO, "parallel.tensor=2"),
        layout=Layout(tensor=2),
        model=NO_EXPERTS,
    ),
    Cell(
        name="TP2 + SP",
        settings=(*ONE, *TWO, "parallel.tensor=2", "parallel.sequence_parallel=true"),
        layout=Layout(tensor=2),
        quick=True,
    ),
    Cell(name="EP2", settings=(*ONE, *TWO, "parallel.expert=2"), layout=Layout(expert=2)),
    Cell(
        name="DP2, distributed optimizer",
        settings=(*ONE, *TWO, "optimizer.distributed=true"),
        layout=Layout(),
        quick=True,
    ),
    Cell(
        name="PP2 x TP2 + SP",
        settings=("launch.processes_per_node=4", "parallel.tensor=2", "parallel.sequence_parallel=true"),
        layout=Layout(tensor=2, pipeline=2),
        world=4,
    ),
)


def counted(overrides: tuple[str, ...]) -> list[int]:
    from megacpp_stp.model.count import count_parameters

    return count_parameters(Training(overrides).chunks, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["TP2 + SP", "EP2"])
def test_a_run_counts_the_parameters_of_the_whole_model(name):
    """What a receipt says is what the planner says, however the model is cut."""
    cell = next(cell for cell in CELLS if cell.name == name)
    settings = (*cell.model, *cell.settings)
    plan = build_plan(load_recipe("nam56r-tiny", settings), device="cpu")
    for found in run_ranks(counted, cell.world, settings, layout=cell.layout, timeout=300):
        assert found == [cost_of(plan).parameters.total]


@cache
def one_process(model: tuple[str, ...]) -> Outcome:
    return run_ranks(train, 1, (*model, *ONE), timeout=300)[0]


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=[] if cell.quick else [pytest.mark.slow]) for cell in CELLS],
)
def test_losses_and_weights_are_those_of_one_process(cell):
    plain = one_process(cell.model)
    outcomes = run_ranks(train, cell.world, (*cell.model, *cell.settings), layout=cell.layout, timeout=300)
    compare_steps(plain, outcomes)
    compare_weights(plain, outcomes)


def compare_steps(plain, outcomes):
    for number, wanted in enumerate(plain.steps):
        found = [outcome.steps[number] for outcome in outcomes]
        losses = [step.loss for step in found if step.loss is not None]
        assert losses == pytest.approx([wanted.loss] * len(losses), rel=1e-5), number
        assert [step.grad_norm for step in found] == pytest.approx([wanted.grad_norm] * len(found), rel=1e-4), number
        assert {name for step in found for name in step.others} == wanted.others.keys()
        for step in found:
            for name, value in step.others.items():
                assert value == pytest.approx(wanted.others[name], rel=1e-5), (number, name)
        assert wanted.loss > 1
        assert all(value > 0 for value in wanted.others.values())
    assert plain.steps[-1].loss < plain.steps[0].loss


def compare_weights(plain, outcomes):
    assert {name for outcome in outcomes for name in outcome.parameters} == plain.parameters.keys()
    for outcome in outcomes:
        for name, mine in outcome.parameters.items():
            wanted = part_of(plain.parameters[name], outcome.cuts[name])
            error = float(torch.linalg.vector_norm(mine - wanted) / torch.linalg.vector_norm(wanted))
            assert error < 1e-5, (name, error)
