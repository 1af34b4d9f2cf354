"""A NAM of every letter, with sparse attention and multi-token prediction, trains alike in every layout.

Each layout begins from one checkpoint, which one process wrote, and writes one that one process reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import Layout, run_ranks
from tests.parity.checkpoints import expert_biases, save_weights
from tests.parity.nam import (
    ALL_LETTERS,
    NO_EXPERTS,
    Outcome,
    Training,
    named_parameters,
    outcome_of,
    part_of,
)
from tests.parity.test_nam_precision import NAMES as FP32_NAMES
from tests.parity.test_nam_precision import has_more_bits_than_bf16

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
    Cell(name="PP2", settings=("parallel.stages=[6, 6]",), layout=Layout(pipeline=2)),
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


@pytest.mark.parametrize("name", [pytest.param("TP2 + SP", marks=pytest.mark.slow), "EP2"])
def test_a_run_counts_the_parameters_of_the_whole_model(name):
    """What a receipt says is what the planner says, however the model is cut."""
    cell = next(cell for cell in CELLS if cell.name == name)
    settings = (*cell.model, *cell.settings)
    plan = build_plan(load_recipe("nam56r-tiny", settings), device="cpu")
    for found in run_ranks(counted, cell.world, settings, layout=cell.layout, timeout=300):
        assert found == [cost_of(plan).parameters.total]


class Found(NamedTuple):
    """What one rank found.

    Attributes:
        loaded: Its weights and expert biases as they came from the checkpoint; of the writer as it wrote them.
        outcome: Of the steps from there.
        trained: Its weights and expert biases after the steps, as it then wrote them.
    """

    loaded: dict[str, Tensor]
    outcome: Outcome
    trained: dict[str, Tensor]


class Ran(NamedTuple):
    """What all ranks found, and where they wrote their trained weights."""

    ranks: list[Found]
    written: str


def begin(overrides: tuple[str, ...], directory: str) -> Found:
    """On one process: write a checkpoint of weights by name, then train from them."""
    training = Training(overrides)
    for name, bias in expert_biases(training.chunks).items():
        # A router without a history would not tell whether its balance came along.
        bias.copy_(0.01 * torch.arange(len(bias)).roll(len(name)))
    save_weights(training, directory)
    return go_on(training, directory=None)


def resume(overrides: tuple[str, ...], source: str, directory: str) -> Found:
    """On each rank of a layout: read a checkpoint, train, and write the next one."""
    return go_on(Training(overrides, load=source), directory=directory)


def go_on(training: Training, *, directory: str | None) -> Found:
    loaded = snapshot(training)
    outcome = outcome_of(training)
    if directory is not None:
        save_weights(training, directory)
    return Found(loaded, outcome, snapshot(training))


def read(overrides: tuple[str, ...], directories: list[str]) -> list[dict[str, Tensor]]:
    """On one process: what each checkpoint holds."""
    return [snapshot(Training(overrides, load=directory)) for directory in directories]


def snapshot(training: Training) -> dict[str, Tensor]:
    """Weights and expert biases on this rank."""
    held = {**dict(named_parameters(training.chunks)), **expert_biases(training.chunks)}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The one checkpoint of a model that every layout begins from, and what one process makes of it."""

    @cache
    def run(model: tuple[str, ...]) -> Ran:
        directory = str(tmp_path_factory.mktemp("begun"))
        return Ran(run_ranks(begin, 1, (*model, *ONE), directory, timeout=300), directory)

    return run


@pytest.fixture(scope="module")
def resumed(begun, tmp_path_factory):
    @cache
    def run(cell: Cell) -> Ran:
        source, directory = begun(cell.model).written, str(tmp_path_factory.mktemp("resumed"))
        settings = (*cell.model, *cell.settings)
        return Ran(
            run_ranks(resume, cell.world, settings, source, directory, layout=cell.layout, timeout=300), directory
        )

    return run


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=[] if cell.quick else [pytest.mark.slow]) for cell in CELLS],
)
def test_losses_and_weights_are_those_of_one_process(begun, resumed, cell):
    plain, ranks = begun(cell.model).ranks[0], resumed(cell).ranks
    same_bits(plain.loaded, [(found.loaded, found.outcome.cuts) for found in ranks])
    compare_steps(plain.outcome, [found.outcome for found in ranks])
    compare_weights(plain.outcome, [found.outcome for found in ranks])


QUICK = [cell for cell in CELLS if cell.quick]
SLOW = {model: [c for c in CELLS if not c.quick and c.model is model] for model in (ALL_LETTERS, NO_EXPERTS)}


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(SLOW[ALL_LETTERS], id="others", marks=pytest.mark.slow),
        pytest.param(SLOW[NO_EXPERTS], id="without experts", marks=pytest.mark.slow),
    ],
)
def test_one_process_reads_what_every_layout_wrote(resumed, cells):
    """After training, so that the checkpoint is not the one that the layout began with."""
    ran = [resumed(cell) for cell in cells]
    wholes = run_ranks(read, 1, (*cells[0].model, *ONE), [one.written for one in ran], timeout=300)[0]
    for whole, one in zip(wholes, ran, strict=True):
        same_bits(whole, [(found.trained, found.outcome.cuts) for found in one.ranks])
        for found in one.ranks:
            assert not all(torch.equal(found.loaded[name], value) for name, value in found.trained.items())


@pytest.mark.slow
def test_fp32_parameters_of_a_bf16_model_keep_their_bits_in_another_layout(begun, resumed):
    model = (*ALL_LETTERS, "training.precision=bf16")
    cell = next(cell for cell in CELLS if cell.name == "TP2 + SP")
    first, second = begun(model).ranks[0], resumed(replace(cell, model=model))
    same_bits(first.loaded, [(found.loaded, found.outcome.cuts) for found in second.ranks])
    (third,) = run_ranks(read, 1, (*model, *ONE), [second.written], timeout=300)[0]
    same_bits(third, [(found.trained, found.outcome.cuts) for found in second.ranks])
    for whole in (first.loaded, third):
        biases = {name for name in whole if name.startswith(("layer ", "prediction, "))}
        assert {name for name, tensor in whole.items() if tensor.dtype == torch.float32} == FP32_NAMES | biases
        for name in FP32_NAMES:
            assert has_more_bits_than_bf16(whole[name]), name


def same_bits(whole, ranks):
    """The parts are those of the whole, in its dtypes, and every number of the whole is on a rank."""
    assert {name for parts, _ in ranks for name in parts} == whole.keys()
    for parts, cuts in ranks:
        for name, mine in parts.items():
            wanted = part_of(whole[name], cuts.get(name))
            assert mine.dtype == wanted.dtype, name
            assert torch.equal(mine, wanted), name


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
