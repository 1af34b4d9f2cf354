import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.recipe import list_recipes, load_recipe

GOLDEN = Path(__file__).parents[1] / "golden"


def plan_with(*overrides, device="cpu"):
    return build_plan(load_recipe("nam56r-tiny", overrides), device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", list_recipes())
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


def test_every_argument_names_the_field_that_asked_for_it():
    known = load_recipe("nam56r-tiny").model_dump()
    for argument in plan_with().arguments:
        first = argument.field.split()[0]
        if first.startswith("--"):
            continue
        node = known
        for key in first.split("."):
            assert key in node, argument
            node = node[key]


def test_families_are_lowered_with_their_table():
    layout = plan_with().layout
    assert layout.megatron_pattern == "+E-E+E|-E+E--"
    assert layout.stand_ins() == {"M": (3, 7, 11), "R": (12,)}
    assert [layer.number for layer in layout.layers if layer.tapped] == [6, 12]
    assert "".join(layer.family for layer in layout.layers) == layout.source
    argv = plan_with().argv
    assert argv[argv.index("--nam-stand-in") + 1] == "M:mamba3=mlp@3,7,11"


def test_virtual_stages_go_round_the_pipeline():
    plan = plan_with("parallel.virtual=2", "parallel.stages=[3,3,3,3]", "stp.taps=[3,6,9,12]")
    assert plan.layout.megatron_pattern == "+E-|E+E|-E+|E--"
    assert [layer.number for layer in plan.layout.rank_layers(0)] == [1, 2, 3, 7, 8, 9]


def test_a_pattern_that_begins_with_an_mlp_stays_a_value():
    overrides = ("model.pattern=MEMEAEMEAEMR", "stp.taps=[6,12]")
    assert "--hybrid-layer-pattern=-E-E+E|-E+E--" in plan_with(*overrides).argv


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
        (["parallel.tensor=2", "launch.processes_per_node=4"], "parallel.tensor"),
        (["parallel.context=2", "launch.processes_per_node=4"], "parallel.context"),
        (["parallel.expert=2", "launch.processes_per_node=4"], "parallel.expert"),
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
