"""`megacpp-stp diff`: the files and runs that it takes, its forms, and what is no plan at all."""

import json
import subprocess
import sys

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import DIFFERENT, EQUAL
from tests.unit.diff.sides import PLAN, TINY, diff, found, receipt_of, refused, run, sealed, side, write


def test_recipe_plan_and_run_directory_of_one_plan_are_equal(tmp_path):
    plan = write(tmp_path / "run" / "plan.json", PLAN)
    recipe = write(tmp_path / "copy.yaml", TINY)
    for left, right in (("nam56r-tiny", plan), (plan, tmp_path / "run"), (tmp_path / "run", recipe)):
        assert diff(left, right)["verdict"] == EQUAL


def test_a_recipe_is_planned_for_the_other_sides_device_unless_told(tmp_path):
    plan = write(tmp_path / "plan.json", PLAN)
    assert found(diff("nam56r-tiny", plan, "--device", "cuda"))["device"] == ("environment", "cuda", "cpu")
    lone = write(tmp_path / "lone" / "receipt.json", receipt_of(PLAN))
    assert diff("nam56r-tiny", lone)["verdict"] == EQUAL
    digests = {
        device: diff("nam56r-tiny", "nam56r-tiny", *device)["a"]["digest"] for device in ((), ("--device", "cpu"))
    }
    assert digests[("--device", "cpu")] == PLAN["digest"] != digests[()]


def test_receipts_with_their_plans_compare_everything_and_the_substrate(tmp_path):
    other = side("optimizer.lr=1e-3").plan
    for name, plan in (("a", PLAN), ("b", other)):
        write(tmp_path / name / "plan.json", plan)
        write(tmp_path / name / "receipt.json", receipt_of(plan))
    changed = receipt_of(other, patches=[], last={"lm_loss": 1.0}, parameters={"total": 6})
    changed["substrate"]["packages"]["torch"] = "2.16.0"
    changed["data"]["splits"]["train"]["tokens"] = 8
    write(tmp_path / "b" / "receipt.json", changed)
    content = diff(tmp_path / "a" / "receipt.json", tmp_path / "b" / "receipt.json")
    assert content["complete"]
    assert found(content) == {
        "optimizer.lr": ("optimisation", 0.003, 0.001),
        "data.splits.train.tokens": ("data", 7, 8),
        "patches.dataset-helpers": ("patches", "applied", None),
        "patches.dsa-memory": ("patches", "applied", None),
        "substrate.packages.torch": ("substrate", "2.15.0", "2.16.0"),
    }
    assert "parameters.total" in {item["path"] for item in content["consequences"]}


def test_other_parameters_of_one_plan_are_a_difference(tmp_path):
    a = write(tmp_path / "a.json", receipt_of(PLAN))
    b = write(tmp_path / "b.json", receipt_of(PLAN, parameters={"total": 6}))
    assert found(diff(a, b)) == {"parameters.total": ("topology", 5, 6)}


def test_the_substrate_needs_two_receipts(tmp_path):
    receipt = write(tmp_path / "receipt.json", receipt_of(PLAN))
    write(tmp_path / "plan.json", PLAN)
    assert diff(receipt, "nam56r-tiny")["verdict"] == EQUAL


def test_a_lone_receipt_says_what_it_can(tmp_path):
    lone = write(tmp_path / "receipt.json", receipt_of(PLAN))
    content = diff(lone, write(tmp_path / "b.json", side("stp.weight=1", "training.seed=5").plan))
    assert not content["complete"]
    assert found(content) == {"stp.weight": ("STP", 0.02, 1.0), "training.seed": ("optimisation", 1234, 5)}


def test_a_lone_receipt_does_not_call_equal_what_it_cannot_see(tmp_path):
    lone = write(tmp_path / "receipt.json", receipt_of(PLAN))
    content = diff(lone, write(tmp_path / "b.json", side("optimizer.lr=1e-3").plan))
    assert set(found(content)) == {"digest"}
    assert content["verdict"] == DIFFERENT


def test_a_receipt_does_not_take_another_runs_plan(tmp_path):
    receipt = write(tmp_path / "receipt.json", receipt_of(PLAN))
    write(tmp_path / "plan.json", side("optimizer.lr=1e-3").plan)
    assert not diff(receipt, "nam56r-tiny")["complete"]


def test_a_receipt_of_an_early_end_has_no_patches(tmp_path):
    early = write(tmp_path / "a.json", receipt_of(PLAN, patches=None, parameters=None))
    late = write(tmp_path / "b.json", receipt_of(PLAN))
    change = ("patches", None, "applied")
    assert found(diff(early, late)) == {"patches.dataset-helpers": change, "patches.dsa-memory": change}


def test_this_reads_the_receipts_that_runs_write():
    from megacpp_stp.runs.receipt import RECEIPT_VERSION, plan_facts

    assert receipt_of(PLAN)["receipt_version"] == RECEIPT_VERSION
    facts = plan_facts(PLAN)
    mine = receipt_of(PLAN)
    for key in ("pattern", "topology", "auxiliary_losses", "seeds", "recipe"):
        assert mine[key].keys() <= facts[key].keys(), key


# --- forms ----------------------------------------------------------------------------------------------


def test_the_table_shows_values_and_what_follows(tmp_path):
    path = write(tmp_path / "x.yaml", TINY.replace("weight: 0.02", "weight: 0.5").replace("name: nam", "name: x"))
    done = run("nam56r-tiny", path)
    assert done.exit_code == 1
    for text in ("STP", "stp.weight", "0.02", "0.5", "argv: 1 argument differs: --nam-stp-weight", "in name only"):
        assert text in done.stdout
    assert run("nam56r-tiny", "nam56r-tiny").stdout.splitlines()[-1] == "equal"


def test_json_is_stable_bytes(tmp_path):
    path = write(tmp_path / "x.yaml", TINY.replace("weight: 0.02", "weight: 0.5"))
    first, second = (run("nam56r-tiny", path, "--format", "json").stdout for _ in range(2))
    assert first == second
    assert set(json.loads(first)) == {
        *("diff_format", "verdict", "complete", "a", "b"),
        *("differences", "labels", "consequences", "idle_overrides"),
    }


def test_foreign_text_cannot_move_the_cursor(tmp_path):
    recipe = {**PLAN["recipe"], "title": "\x1b[2J\x9b31m\ud800", "data": {"path": "\u202e"}}
    plan = write(tmp_path / "plan.json", sealed(PLAN, recipe=recipe))
    done = run(plan, "nam56r-tiny")
    assert done.exit_code == 1
    assert not {"\x1b", "\x9b", "\u202e"} & set(done.stdout)
    assert diff(plan, "nam56r-tiny")["verdict"] == DIFFERENT


def test_the_planner_compares_without_torch():
    code = (
        "import sys; import megacpp_stp.plan.diff, megacpp_stp.cli.diff, megacpp_stp.recipe.json_schema;"
        "sys.exit(', '.join(m for m in ('torch', 'megatron', 'numpy') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        '"plan_format"',
        "{}",
        '{"plan_format": 1}',
        '{"plan_format": 2}',
        '{"plan_format": null}',
        '{"receipt_version": 1}',
        '{"receipt_version": [1]}',
        '{"receipt_version": 1, "plan_digest": 5, "recipe": {}, "pattern": {}, "topology": {}}',
        "[" * 200_000,
        '{"a":' * 900 + "1" + "}" * 900,
        "1" * 5000,
        '{"plan_format": NaN}',
        '{"plan_format": 1e999}',
        json.dumps(PLAN)[:-40],
        json.dumps({**PLAN, "world_size": 3}),
        json.dumps({**PLAN, "digest": 7}),
        json.dumps(sealed(PLAN, recipe=[])),
        json.dumps(sealed(PLAN, layout={"layers": 5})),
        json.dumps(sealed(PLAN, argv=[1])),
        json.dumps(sealed(PLAN, env=None)),
        json.dumps(sealed(PLAN, device="tpu")),
    ],
)
def test_what_is_no_plan_is_one_clear_error(tmp_path, content):
    path = write(tmp_path / "x.json", content)
    assert "x.json" in refused(path, "nam56r-tiny")
    assert "x.json" in refused("nam56r-tiny", path)


def test_binary_is_one_clear_error(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert "x.json" in refused(path, path)


@pytest.mark.parametrize(
    "receipt",
    [
        {"substrate": [1], "topology": {"tensor": {"deep": [{}]}}, "patches": [5, None, {"state": {}}]},
        {"auxiliary_losses": 3, "seeds": "x", "data": [], "spec": None, "parameters": 5, "recipe": {"overrides": 5}},
    ],
)
def test_a_hostile_receipt_is_compared_or_refused(tmp_path, receipt):
    hostile = write(tmp_path / "x.json", receipt_of(PLAN, **receipt))
    assert run(hostile, write(tmp_path / "y.json", receipt_of(PLAN))).exit_code == 1
    for other in (tmp_path / "y.json", "nam56r-tiny"):
        done = run(hostile, other, "--format", "json")
        assert done.exception is None or isinstance(done.exception, SystemExit | UserError), repr(done.exception)


def test_a_hostile_plan_with_a_digest_that_fits_is_compared(tmp_path):
    recipe = {"overrides": 5, "model": [], "a.b": {"": 1}, "stp": {"taps": {"x": [True, {"y": 0}]}}}
    plan = write(tmp_path / "x.json", sealed(PLAN, recipe=recipe, patches=[[1], {}], env={"X": {}}, argv=["x", "-y"]))
    assert diff(plan, "nam56r-tiny")["verdict"] == DIFFERENT
    assert run(plan, "nam56r-tiny").exit_code == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nam56r-tny", "did you mean nam56r-tiny?"),
        ("no/such.json", "no/such.json"),
        ("no-such.yaml", "no-such.yaml"),
        ("no-such.json", "no-such.json"),
        ("x" * 5000 + ".json", "too long"),
        ("a/" * 5000, "too long"),
        ("/dev/zero", "is no regular file"),
    ],
)
def test_a_side_that_is_not_there_is_named(name, says):
    assert says in refused(name, "nam56r-tiny")


def test_a_directory_without_a_plan_is_named(tmp_path):
    assert "plan.json" in refused(tmp_path, "nam56r-tiny")


def test_a_device_beside_two_plans_is_refused(tmp_path):
    plan = write(tmp_path / "plan.json", PLAN)
    assert "--device" in refused(plan, plan, "--device", "cpu")


def test_a_bad_recipe_is_its_own_error(tmp_path):
    path = write(tmp_path / "x.yaml", TINY.replace("weight: 0.02", "weight: heavy"))
    assert "stp.weight" in refused(path, "nam56r-tiny")
