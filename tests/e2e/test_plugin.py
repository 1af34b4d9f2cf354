"""STP in a stock Megatron script, by ``--spec`` and the plan file alone, against the same run by our own entry."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plugin import PLAN, planned_arguments
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.metrics import read_metrics
from tests.e2e.conftest import SHORT, environment

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("stock_script.py")
# What a GPU machine and a source checkout of Megatron have: neither is of the script, nor of STP.
ON_THIS_MACHINE = """
import contextlib, runpy, sys
from megacpp_stp.training.cpu_backend import install
import megatron.core.datasets.utils as utils
utils.compile_helpers = lambda: None
with install():
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def arguments(plan, spec):
    """The plan's arguments without ours, as somebody else would pass them."""
    for argument in plan.arguments:
        if argument.tokens[0] == "--spec":
            yield from ("--spec", *spec)
        elif not argument.tokens[0].startswith("--nam-"):
            yield from argument.tokens


def stock_run(tmp_path, overrides, *, spec=("megacpp_stp.plugin", "stp_stack_spec"), extra=(), planned=None):
    """The finished process, and the losses of its microbatches."""
    plan = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu")
    file, launcher, losses = tmp_path / "plan.json", tmp_path / "here.py", tmp_path / "losses"
    file.write_text(json.dumps((planned or plan).as_dict()))
    launcher.write_text(ON_THIS_MACHINE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(launcher)]
    done = subprocess.run(
        [*command, str(SCRIPT), *arguments(plan, spec), *extra],
        env={
            **environment(),
            **{variable.name: variable.value for variable in plan.env},
            PLAN: str(file),
            "STOCK_LOSSES": str(losses),
            "PYTHONPATH": str(ROOT),  # where the package is not installed
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, [json.loads(line) for line in losses.read_text().splitlines()] if losses.exists() else []


def by_iteration(losses, *, microbatches):
    """Loss a token of each iteration."""
    groups = itertools.batched(losses, microbatches)
    return [sum(total for total, _ in group) / sum(tokens for _, tokens in group) for group in groups]


def test_a_stock_script_trains_exactly_as_our_own_entry_does(run, dataset, tmp_path):
    overrides = (*SHORT, f"data.path={dataset}")
    board = tmp_path / "board"
    done, losses = stock_run(tmp_path, overrides, extra=("--tensorboard-dir", str(board)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    records = read_metrics(run[0] / "metrics.jsonl")
    assert by_iteration(losses, microbatches=4) == [record["lm_loss"] for record in records]
    said = [line for line in done.stdout.splitlines() if "stp loss by tap" in line]
    assert len(said) == len(records) == 6
    for line, record in zip(said, records, strict=True):
        assert f"stp loss: {record['stp_loss']:.6E} | stp weighted: {record['stp_weighted']:.6E}" in line
        assert all(f"{tap}: {loss:.6E}" in line for tap, loss in record["stp_loss_by_tap"].items())
    assert scalars(board)["stp straightness/12"] == pytest.approx(
        [record["stp_straightness_by_tap"]["12"] for record in records], rel=1e-6
    )


def scalars(board):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_without_the_gradient_the_losses_part_ways(run, dataset, tmp_path):
    """That the equality above can fail."""
    _, losses = stock_run(tmp_path, (*SHORT, f"data.path={dataset}", "stp.weight=0"))
    records = read_metrics(run[0] / "metrics.jsonl")
    ours = [record["lm_loss"] for record in records]
    theirs = by_iteration(losses, microbatches=4)
    assert theirs[:4] == ours[:4]  # the gate opens in the fourth
    assert theirs[4:] != ours[4:]


@pytest.mark.slow
def test_a_plan_of_another_model_is_refused(dataset, tmp_path):
    overrides = (*SHORT, f"data.path={dataset}")
    other = build_plan(load_recipe("nam56r-tiny", (*overrides, "model.hidden_size=256")), device="cpu")
    done, _ = stock_run(tmp_path, overrides, planned=other)
    assert done.returncode != 0
    assert "--hidden-size: is 128 in this script and 256 in the plan" in done.stderr


def test_no_plan_is_said(monkeypatch):
    monkeypatch.delenv(PLAN, raising=False)
    with pytest.raises(UserError, match="names no plan") as caught:
        planned_arguments()
    assert caught.value.field == PLAN
    assert os.environ.get(PLAN) is None


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["training.fused_cross_entropy=null"], "model.families.A.sparse.kernel"),
        (["model.families.A.sparse.kernel=upstream"], "training.fused_cross_entropy"),
    ],
)
def test_a_plan_that_counts_on_our_own_entry_is_refused(tmp_path, monkeypatch, overrides, field):
    plan = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu")
    (tmp_path / "plan.json").write_text(json.dumps(plan.as_dict()))
    monkeypatch.setenv(PLAN, str(tmp_path / "plan.json"))
    with pytest.raises(UserError) as caught:
        planned_arguments()
    assert caught.value.field == field
