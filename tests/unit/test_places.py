"""No place of a machine in a receipt, by way of what ``--set`` was given."""

import json

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.places import without_place
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.attempts import find_continuation, rewind
from megacpp_stp.runs.files import write_json
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.runs.sides import read_sides


@pytest.mark.parametrize(
    "value",
    [
        *("/scratch/me/data", "'/scratch/me/my data'", "~/data", "{path: /scratch/me, workers: 2}", "[a,/b]"),
        *("https://host/data", "file:///data", "a=/b", "x;/y"),
    ],
)
def test_a_value_with_a_place_is_left_out(value):
    assert without_place(f"data.path={value}") == "data.path=(a place)"


@pytest.mark.parametrize(
    "override",
    [
        *("data.path=data/mine", "data.path=../mine", "stp.weight=0.05", "model.pattern=AEMEAEMR|AE"),
        *("launch.environment.PYTORCH_ALLOC_CONF=a:True,b:2", "training.checkpoint={interval: 4, keep_every: null}"),
    ],
)
def test_everything_else_stays(override):
    assert without_place(override) == override


@pytest.fixture
def run(tmp_path):
    """A run whose data is at an absolute path."""
    plan = build_plan(load_recipe("nam56r-tiny", ("training.seed=7", f"data.path={tmp_path}/data")), device="cpu")
    write_json(tmp_path / "plan.json", plan.as_dict())
    Receipt.create(tmp_path, plan_facts(plan.as_dict()))
    return tmp_path, plan.as_dict()


def test_a_receipt_holds_no_path_and_the_run_goes_on(run):
    directory, plan = run
    text = (directory / "receipt.json").read_text()
    assert json.loads(text)["recipe"]["overrides"] == ["training.seed=7", "data.path=(a place)"]
    assert str(directory) not in text
    assert find_continuation(directory, plan, may_change=False) == 0
    rewind(directory, plan, iteration=0)
    assert str(directory) not in (directory / "receipt.json").read_text()


def test_a_receipt_alone_does_not_differ_from_its_plan(run):
    directory, _ = run
    alone = directory / "alone" / "receipt.json"
    alone.parent.mkdir()
    alone.write_bytes((directory / "receipt.json").read_bytes())
    found = compare(*read_sides(str(alone), str(directory / "plan.json"), device=None))
    assert found.labels == ()
    assert {item.group for item in found.differences} <= {"patches"}  # no rank has proven them yet
