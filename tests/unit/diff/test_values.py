"""`megacpp-stp diff`: what really differs, and what only follows."""

import json

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.diff import DIFFERENT, EQUAL, EQUAL_IN_EFFECT, GROUPS, compare
from megacpp_stp.recipe import load_recipe
from megacpp_stp.recipe.schema import Stp
from tests.unit.diff.sides import PLAN, TINY, diff, sealed, side, write


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
                "parallel.stages": ("topology", [8, 4], [7, 5]),
                "layout.megatron_pattern": ("topology", "+EMEDEME|DEMM", "+EMEDEM|EDEMM"),
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
    result = compare(side("stp.max_span=9"), side("stp=null"))
    assert {item.path: item.b for item in result.differences} == dict.fromkeys(f"stp.{key}" for key in Stp.model_fields)


def test_devices_differ_in_the_environment():
    result = compare(side(), side(device="cuda"))
    assert {item.group for item in result.differences} == {"environment"}
    paths = [item.path for item in result.differences]
    assert paths[0] == "device" and all(path.startswith("env.") for path in paths[1:])
    assert {"env.CUDA_VISIBLE_DEVICES", "env.TORCHDYNAMO_DISABLE"} < set(paths)


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
    section = load_recipe("nam56r-tiny").stp.model_dump(mode="json")
    text = f"stp={json.dumps(section | {'weight': 0.5})}"
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


def test_an_automatic_cut_equals_the_same_cut_written_out():
    chosen = build_plan(load_recipe("nam56r-pp2-vpp2"))
    stages = list(chosen.layout.stages)
    written = build_plan(load_recipe("nam56r-pp2-vpp2", [f"parallel.stages={stages}"]))
    found = compare(side(plan=chosen.as_dict()), side(plan=written.as_dict()))
    assert found.verdict == EQUAL_IN_EFFECT
    stages[0], stages[1] = stages[0] + 1, stages[1] - 1
    other = build_plan(load_recipe("nam56r-pp2-vpp2", [f"parallel.stages={stages}"]))
    found = compare(side(plan=chosen.as_dict()), side(plan=other.as_dict()))
    assert found.verdict == DIFFERENT
    assert "parallel.stages" in [item.path for item in found.differences]
