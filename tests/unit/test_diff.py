"""`megacpp-stp diff`: what really differs, what only follows, and what is no plan at all."""

import hashlib
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from megacpp_stp.cli.diff import diff_command
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.diff import DIFFERENT, EQUAL, EQUAL_IN_EFFECT, GROUPS, Side, compare
from megacpp_stp.recipe import find_recipe, load_recipe

TINY = find_recipe("nam56r-tiny").read_text()
PLAN = build_plan(load_recipe("nam56r-tiny"), device="cpu").as_dict()


def run(*arguments):
    app = typer.Typer()
    app.command()(diff_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def diff(*arguments):
    """The JSON form, with the exit status checked against it."""
    done = run(*arguments, "--format", "json")
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    content = json.loads(done.stdout)
    assert done.exit_code == (1 if content["verdict"] == DIFFERENT else 0)
    return content


def refused(*arguments):
    done = run(*arguments)
    assert isinstance(done.exception, UserError), (done.exception, done.stdout)
    assert done.exception.field
    assert done.exception.fix
    return str(done.exception)


def side(*overrides, device="cpu", plan=None):
    plan = plan or build_plan(load_recipe("nam56r-tiny", overrides), device=device).as_dict()
    return Side(given="x", kind="plan", digest=plan["digest"], plan=plan)


def sealed(plan, **changes):
    """A plan with other content and a digest that fits it."""
    plan = {**plan, **changes}
    plan.pop("digest", None)
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {"digest": hashlib.sha256(text.encode()).hexdigest(), **plan}


def receipt_of(plan, **changes):
    recipe, layout = plan["recipe"], plan["layout"]
    return {
        "receipt_version": 1,
        "status": "complete",
        "plan_digest": plan["digest"],
        "recipe": {key: recipe[key] for key in ("name", "provenance", "overrides")},
        "spec": {"module": "m", "name": "n", "backend": "torch"},
        "pattern": {"source": layout["source_pattern"], "megatron": layout["megatron_pattern"]},
        "auxiliary_losses": {"stp": recipe["stp"], "moe_load_balancing": 1e-4, "moe_z_loss": 0, "mtp": None},
        "topology": {
            "world_size": plan["world_size"],
            "data_parallel": plan["data_parallel"],
            "micro_batches": plan["micro_batches"],
            **{key: recipe["parallel"][key] for key in ("tensor", "pipeline", "virtual", "context", "expert")},
        },
        "seeds": {"training": recipe["training"]["seed"], "stp": recipe["stp"]["seed"]},
        "iterations_planned": recipe["training"]["iterations"],
        "substrate": {
            "hardware": {"device": plan["device"], "machine": "x86_64", "cpu_count": 2},
            "python": "3.12.1",
            "packages": {"torch": "2.15.0", "numpy": "2.5.5"},
        },
        "data": {"splits": {"train": {"tokens": 7, "bin_sha256": "ab"}}},
        "patches": [{"id": "dataset-helpers", "state": "applied"}],
        "parameters": {"total": 5, "by_pipeline_rank": [3, 2]},
        "last": {"lm_loss": 5.0},
        **changes,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def found(content):
    return {item["path"]: (item["group"], item["a"], item["b"]) for item in content["differences"]}


# --- what differs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stp.weight=0.05"], {"stp.weight": ("STP", 0.02, 0.05)}),
        (["stp.taps=[12]"], {"stp.taps": ("STP", [6, 12], [12])}),
        (["optimizer.lr=1e-3"], {"optimizer.lr": ("optimisation", 0.003, 0.001)}),
        (["training.sequence_length=128"], {"training.sequence_length": ("optimisation", 256, 128)}),
        (["data.path=elsewhere"], {"data.path": ("data", "data/torch-headers", "elsewhere")}),
        (["model.hidden_size=256"], {"model.hidden_size": ("topology", 128, 256)}),
        (
            ["parallel.stages=[7, 5]"],
            {
                "parallel.stages": ("topology", [6, 6], [7, 5]),
                "layout.megatron_pattern": ("topology", "+E-E+E|-E+E--", "+E-E+E-|E+E--"),
            },
        ),
        (
            ["launch.processes_per_node=4"],
            {
                "launch.processes_per_node": ("parallelism", 2, 4),
                "world_size": ("parallelism", 2, 4),
                "data_parallel": ("parallelism", 1, 2),
                "micro_batches": ("parallelism", 4, 2),
            },
        ),
        (
            ["model.families.E.router.aux_loss_coeff=0"],
            {"model.families.E.router.aux_loss_coeff": ("topology", 1e-4, 0.0)},
        ),
    ],
)
def test_a_changed_value_is_found_in_its_group(overrides, expected):
    result = compare(side(), side(*overrides))
    assert {item.path: (item.group, item.a, item.b) for item in result.differences} == expected
    assert result.verdict == DIFFERENT


def test_a_section_that_goes_is_each_of_its_values():
    result = compare(side(), side("stp=null"))
    assert {item.path: item.b for item in result.differences} == dict.fromkeys(
        ("stp.weight", "stp.n_spans", "stp.start_step", "stp.taps", "stp.seed")
    )


def test_devices_differ_in_the_environment():
    result = compare(side(), side(device="cuda"))
    assert {item.group for item in result.differences} == {"environment"}
    paths = [item.path for item in result.differences]
    assert paths == ["device", "env.CUDA_VISIBLE_DEVICES", "env.TORCHDYNAMO_DISABLE"]


def test_groups_come_in_their_order():
    result = compare(side(), side("stp.seed=1", "optimizer.lr=1e-3", "model.heads=8", "data.workers=1", device="cuda"))
    groups = list(dict.fromkeys(item.group for item in result.differences))
    assert groups == sorted(groups, key=GROUPS.index)
    assert len(groups) == 5


def test_what_only_follows_is_counted_not_listed():
    result = compare(side(), side("training.iterations=200", "stp.taps=[12]"))
    assert [item.path for item in result.differences] == ["training.iterations", "stp.taps"]
    follows = {item.path: item.items for item in result.consequences}
    assert follows == {
        "argv": ("--lr-decay-iters", "--nam-stp-taps", "--train-iters"),
        "layout.layers": ("6",),
        "digest": (),
    }


def test_the_two_directions_mirror():
    there, back = compare(side(), side("stp.weight=1")), compare(side("stp.weight=1"), side())
    assert [(i.path, i.a, i.b) for i in there.differences] == [(i.path, i.b, i.a) for i in back.differences]


# --- what does not ------------------------------------------------------------------------------------


def test_a_plan_equals_itself():
    result = compare(side(), side())
    assert (result.verdict, result.differences, result.consequences, result.labels) == (EQUAL, (), (), ())


def test_an_override_that_sets_what_was_there_is_equal_in_effect():
    result = compare(side(), side("stp.weight=0.02"))
    assert result.verdict == EQUAL_IN_EFFECT
    assert [(item.side, item.override) for item in result.idle_overrides] == [("b", "stp.weight=0.02")]
    assert [item.path for item in result.labels] == ["overrides"]


def test_only_the_idle_override_is_called_idle():
    result = compare(side("model.families.E.topk=2"), side("stp.weight=0.02", "optimizer.lr=1e-3"))
    assert [item.path for item in result.differences] == ["optimizer.lr"]
    assert [(item.side, item.override) for item in result.idle_overrides] == [
        ("a", "model.families.E.topk=2"),
        ("b", "stp.weight=0.02"),
    ]


def test_a_section_override_is_idle_only_when_nothing_in_it_differs():
    text = "stp={weight: 0.5, n_spans: 4, start_step: 150, taps: [6, 12], seed: 1234}"
    assert compare(side(), side(text)).idle_overrides == ()
    assert compare(side("stp.weight=0.5"), side(text)).verdict == EQUAL_IN_EFFECT


def test_a_name_is_no_difference(tmp_path):
    path = write(tmp_path / "x.yaml", TINY.replace("name: nam56r-tiny", "name: other"))
    content = diff("nam56r-tiny", path)
    assert content["verdict"] == EQUAL_IN_EFFECT
    assert content["labels"] == [{"path": "name", "a": "nam56r-tiny", "b": "other"}]


def test_key_order_and_comments_are_no_difference(tmp_path):
    head, stp, tail = TINY.partition("\nstp:\n")[0], "\nstp:\n", TINY.partition("\nstp:\n")[2]
    body, rest = tail.partition("\n\n")[0], tail.partition("\n\n")[2]
    moved = write(tmp_path / "x.yaml", f"{head}\n{rest}\n# moved{stp}{body}\n")
    assert diff("nam56r-tiny", moved)["verdict"] == EQUAL


def test_zero_is_zero_but_true_is_not_one():
    def with_seed(value):
        recipe = {**PLAN["recipe"], "training": {**PLAN["recipe"]["training"], "seed": value}}
        return side(plan=sealed(PLAN, recipe=recipe))

    assert compare(with_seed(0), with_seed(0.0)).differences == ()
    assert [item.path for item in compare(with_seed(1), with_seed(True)).differences] == ["training.seed"]


def test_an_optional_key_that_is_null_equals_its_absence():
    recipe = {**PLAN["recipe"], "mtp": None}
    result = compare(side(plan=PLAN), side(plan=sealed(PLAN, recipe=recipe)))
    assert (result.differences, result.verdict) == ((), EQUAL_IN_EFFECT)


# --- plans of other versions ----------------------------------------------------------------------------


def test_what_follows_from_nothing_is_a_difference_itself():
    """Two versions may plan one recipe differently."""
    result = compare(side(plan=PLAN), side(plan=sealed(PLAN, argv=[*PLAN["argv"], "--new-flag"])))
    assert [(item.path, item.a, item.b) for item in result.differences] == [("argv", [], [["--new-flag"]])]
    swapped = compare(side(plan=PLAN), side(plan=sealed(PLAN, argv=[*PLAN["argv"][2:], *PLAN["argv"][:2]])))
    assert [item.path for item in swapped.differences] == ["argv"]
    layers = [{**PLAN["layout"]["layers"][0], "symbol": "D"}, *PLAN["layout"]["layers"][1:]]
    result = compare(side(plan=PLAN), side(plan=sealed(PLAN, layout={**PLAN["layout"], "layers": layers})))
    assert [(item.group, item.path) for item in result.differences] == [("topology", "layout.layers")]


def test_no_part_of_a_plan_differs_unseen():
    for key, value in PLAN.items():
        if key in ("digest", "plan_format"):
            continue
        changed = {**value, "new": 5} if isinstance(value, dict) else [] if isinstance(value, list) else "other"
        assert compare(side(plan=PLAN), side(plan=sealed(PLAN, **{key: changed}))).verdict == DIFFERENT, key
    assert compare(side(plan=PLAN), side(plan=sealed(PLAN, extra=1))).verdict == DIFFERENT
    for key, value in PLAN["layout"].items():
        layout = {**PLAN["layout"], key: [] if isinstance(value, list) else "other"}
        assert compare(side(plan=PLAN), side(plan=sealed(PLAN, layout=layout))).verdict == DIFFERENT, key


def test_a_recipe_section_named_like_a_part_of_the_plan_is_not_lost():
    recipe = {**PLAN["recipe"], "patches": {"x": 1}}
    result = compare(side(plan=PLAN), side(plan=sealed(PLAN, recipe=recipe)))
    assert [(item.group, item.path) for item in result.differences] == [("patches", "recipe.patches.x")]


# --- files and runs ------------------------------------------------------------------------------------


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
    assert found(diff(early, late)) == {"patches.dataset-helpers": ("patches", None, "applied")}


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
        ("/dev/zero", "larger than any file of a run"),
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
