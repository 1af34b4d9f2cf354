import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.recipe import list_recipes, load_recipe
from tests.recipes import STAND_INS

GOLDEN = Path(__file__).parents[1] / "golden"


def plan_with(*overrides, device="cpu"):
    return build_plan(load_recipe("nam56r-tiny", overrides), device=device)


def recipes_by_device():
    for name in list_recipes():
        yield name, "cuda"
        if load_recipe(name).model.backend == "torch":
            yield name, "cpu"


@pytest.mark.parametrize(("name", "device"), list(recipes_by_device()))
def test_argv_is_golden(name, device, request):
    golden = GOLDEN / f"{name}.{device}.argv"
    argv = "\n".join(build_plan(load_recipe(name), device=device).argv) + "\n"
    if request.config.getoption("--update-golden"):
        golden.write_text(argv)
    assert golden.read_text() == argv


def test_argv_is_the_same_bytes_in_any_process(tmp_path):
    outputs = set()
    for seed, locale in (("0", "C"), ("1", "C.UTF-8"), ("77", "POSIX")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale}
        command = [sys.executable, "-m", "megacpp_stp", "plan", "nam56r-tiny", "--format", "argv"]
        outputs.add(subprocess.run(command, capture_output=True, check=True, env=env).stdout)
    assert len(outputs) == 1


def fields_of(argument):
    """The recipe paths that an argument names, without the reason in parentheses."""
    return [field.strip() for field in argument.field.split(" (")[0].split(",") if not field.startswith("--")]


@pytest.mark.parametrize("name", list_recipes())
def test_every_argument_names_fields_of_the_recipe(name):
    recipe = load_recipe(name)
    known = recipe.model_dump()
    for argument in build_plan(recipe).arguments:
        for field in fields_of(argument):
            node = known
            for key in field.split("."):
                assert key in node, argument
                node = node[key]


def leaves(node, path=()):
    if isinstance(node, dict):
        for key, item in node.items():
            yield from leaves(item, (*path, key))
    else:
        yield ".".join(path), node


def changed(key, value):
    """Another value for a key, as an override; None where there is none to try."""
    if isinstance(value, bool):
        return f"{key}={str(not value).lower()}"
    if isinstance(value, int):
        return f"{key}={value * 2}"
    if isinstance(value, float):
        return f"{key}={value / 2}"
    return None


@pytest.mark.parametrize("name", ["nam56r", "nam52", "nam56r-tiny", "nam56r-pp2-vpp2"])
def test_what_a_field_changes_is_what_names_it(name):
    """Change each number of a recipe: every argument that differs names that field, so that none is traced wrongly."""
    recipe = load_recipe(name)
    before = {argument.tokens: argument for argument in build_plan(recipe).arguments}
    tried = 0
    for key, value in leaves(recipe.model_dump(exclude={"overrides"})):
        override = changed(key, value)
        if override is None:
            continue
        try:
            after = {argument.tokens: argument for argument in build_plan(load_recipe(name, [override])).arguments}
        except UserError:
            continue
        tried += 1
        for tokens in before.keys() ^ after.keys():
            argument = before.get(tokens) or after[tokens]
            if argument.tokens[0].startswith("--hybrid-layer-pattern") and recipe.parallel.stages == "auto":
                continue  # the best cut depends on every size
            assert any(key == field or key.startswith(f"{field}.") for field in fields_of(argument)), (key, argument)
    assert tried > 25


def test_families_are_lowered_with_their_table():
    layout = plan_with().layout
    assert layout.megatron_pattern == "+EMEDEME|DEMM"
    assert layout.stand_ins() == {}
    assert [layer.number for layer in layout.layers if layer.tapped] == [6, 12]
    assert "".join(layer.family for layer in layout.layers) == layout.source


def test_a_stand_in_is_named_in_plan_and_argv():
    plan = build_plan(load_recipe(STAND_INS), device="cpu")
    assert plan.layout.megatron_pattern == "+E-E+E|-E+E--"
    assert plan.layout.stand_ins() == {"M": (3, 7, 11), "R": (12,)}
    named = [value for option, value in pairwise(plan.argv) if option == "--nam-stand-in"]
    assert named == ["M:mamba3=mlp@3,7,11", "R:m2rnn=mlp@12"]


def test_virtual_stages_go_round_the_pipeline():
    plan = build_plan(load_recipe("nam56r-tiny-vpp2"), device="cpu")
    assert plan.layout.megatron_pattern == "+EM|EDE|MED|EMM"
    assert [layer.number for layer in plan.layout.rank_layers(0)] == [1, 2, 3, 7, 8, 9]


def test_a_pattern_that_begins_with_an_mlp_stays_a_value():
    plan = build_plan(load_recipe(STAND_INS, ["model.pattern=MEMEAEMEAEMR"]), device="cpu")
    assert "--hybrid-layer-pattern=-E-E+E|-E+E--" in plan.argv


def test_the_digest_covers_recipe_device_and_overrides():
    digests = {
        plan_with().digest,
        plan_with(device="cuda").digest,
        plan_with("stp.weight=0.03").digest,
        plan_with("stp.weight=0.02").digest,  # same value, but an override: recorded
    }
    assert len(digests) == 4
    assert plan_with().digest == plan_with().digest


def test_the_digest_can_be_recomputed_from_the_file():
    plan = plan_with()
    again = json.loads(json.dumps(plan.as_dict()))
    assert plan_digest(again) == plan.digest
    again["recipe"]["stp"]["weight"] = 0.5
    assert plan_digest(again) != plan.digest


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["parallel.stages=[6]"], "parallel.stages"),
        (["parallel.stages=[6,5]"], "parallel.stages"),
        (["launch.processes_per_node=3"], "launch.processes_per_node"),
        (["training.global_batch_size=7"], "training.global_batch_size"),
        (["stp.taps=[13]"], "stp.taps"),
        (["stp.taps=[12,6]"], "stp.taps"),
        (["stp.taps=[6,6]"], "stp.taps"),
        (["stp.start_step=300"], "stp.start_step"),
        (["model.families.E.topk=5"], "model.families.E.topk"),
        (["model.families.E.router.score_function=softmax"], "model.families.E.router.score_function"),
        (["optimizer.min_lr=1"], "optimizer.min_lr"),
        (["stp.n_spans=1000"], "stp.n_spans"),
        (["model.heads=3"], "model.hidden_size"),
        (["model.families.A.qk_pos_emb_head_dim=15"], "model.families.A.qk_pos_emb_head_dim"),
        (["optimizer.warmup_iterations=300"], "optimizer.warmup_iterations"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel"),
        (["parallel.pipeline=1", "parallel.virtual=2"], "parallel.virtual"),
        (
            ["parallel.virtual=2", "parallel.stages=[3,3,3,3]", "training.global_batch_size=6"],
            "training.global_batch_size",
        ),
        # Megatron 0.19 hangs in its first log when a pipeline rank has no expert layer.
        (["model.pattern=AMAMAMAEAEMR"], "parallel.stages"),
    ],
)
def test_what_cannot_run_is_refused(overrides, field):
    with pytest.raises(UserError) as caught:
        plan_with(*overrides)
    assert caught.value.field == field
    assert caught.value.fix


def test_a_plan_without_stp_has_no_stp_argument():
    argv = plan_with("stp=null").argv
    assert not [token for token in argv if token.startswith("--nam-stp")]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 3))
def test_no_cut_loses_or_doubles_a_layer(stages, pipeline, virtual):
    overrides = (
        f"parallel.stages={stages}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual={virtual}",
        f"launch.processes_per_node={pipeline}",
    )
    try:
        layout = plan_with(*overrides).layout
    except UserError:
        return
    assert [layer.number for segment in layout.segments for layer in segment] == list(range(1, 13))
    ranks = sorted(layer.number for rank in range(pipeline) for layer in layout.rank_layers(rank))
    assert ranks == list(range(1, 13))
    assert layout.megatron_pattern.replace("|", "") == "".join(layer.symbol for layer in layout.layers)
