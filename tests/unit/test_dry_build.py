"""Ranks of a world of 512 that one CPU builds without the others: as the plan says, and as Megatron numbers them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megacpp_stp.cli.app import build_app
from megacpp_stp.cli.check_build import Build, StandIn
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.placement import place
from megacpp_stp.recipe import list_recipes, load_recipe
from megacpp_stp.training import dry_backend, dry_build
from megacpp_stp.training.dry_backend import on_torch, require_buildable
from megacpp_stp.training.dry_build import compare, default_ranks
from megacpp_stp.training.dry_facts import BUILT, REFUSED, Facts
from tests.te_double import PATH

NODES = ("launch.nodes=64", "launch.processes_per_node=8")
# Every kind of group, copies of the embedding, and layers of each letter on both pipeline ranks.
TINY = (
    *NODES,
    "parallel={tensor: 2, pipeline: 2, virtual: 2, context: 1, expert: 2, sequence_parallel: true, stages: auto}",
    "training.global_batch_size=512",
    "model.families.A.sparse.ranks=[0,1,2]",
    "model.mtp={depths: 1, pattern: AE, loss_coeff: 0.3}",
    "model.tie_embeddings=true",
    "stp.taps=[6,12,final-norm]",
    "training.precision=bf16",
    "optimizer.distributed=true",
    "optimizer.overlap_grad_reduce=true",
)
LARGE = (
    *NODES,
    "parallel={tensor: 2, pipeline: 4, virtual: 2, context: 1, expert: 4, sequence_parallel: true, stages: auto}",
    "training.global_batch_size=1024",
)
WORLD = 512


def planned(name, *overrides):
    return build_plan(load_recipe(name, overrides))


@pytest.fixture(scope="module")
def plan():
    return planned("nam56r-tiny", *TINY)


@pytest.fixture(scope="module")
def built(plan):
    """What the first and the last rank of each stage are; one process of seconds."""
    return {facts.rank: facts for facts in dry_build._build(plan, default_ranks(place(plan.recipe)))}


# --- the real thing ---------------------------------------------------------------------------------


def test_both_ends_of_each_stage_are_as_planned(plan, built):
    assert list(built) == [0, 255, 256, 511]
    reports = [compare(plan, place(plan.recipe), facts) for facts in built.values()]
    for report in reports:
        assert not report.differences
        assert report.built == report.planned > 0
        assert 0 < report.optimized < report.built  # the distributed optimizer's part
    assert [report.layers for report in reports[::2]] == [
        tuple((segment[0].number, segment[-1].number) for segment in plan.layout.segments[stage::2])
        for stage in range(2)
    ]
    assert [report.node for report in reports] == [0, 31, 32, 63]
    assert reports[0].place == {"tensor": 0, "context": 0, "expert": 0, "data": 0, "pipeline": 0}
    assert reports[-1].place == {"tensor": 1, "context": 0, "expert": 1, "data": 127, "pipeline": 1}
    assert {tap for facts in built.values() for tap in facts.taps} == {"6", "12", "final-norm"}


def test_groups_are_those_of_megatrons_own_generator(built):
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=2, ep=1, dp=128, pp=2, cp=1, order=order)
    experts = RankGenerator(tp=2, ep=2, dp=64, pp=2, cp=1, order=order)
    wanted = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp-cp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "tensor and expert": experts.get_ranks("tp-ep"),
        "expert data": experts.get_ranks("dp"),
    }
    for rank, facts in built.items():
        assert facts.groups.keys() == wanted.keys()
        for axis, groups in wanted.items():
            assert list(facts.groups[axis]) in groups and rank in facts.groups[axis], (rank, axis)


# --- what is not as planned -------------------------------------------------------------------------


def first_chunk(facts, **changes):
    return replace(facts, chunks=(replace(facts.chunks[0], **changes), *facts.chunks[1:]))


def longer(facts):
    (number, count), *rest = facts.chunks[0].layers
    return first_chunk(facts, layers=((number, count + 1), *rest))


def moved(facts):
    return first_chunk(facts, layers=tuple((number + 1, count) for number, count in facts.chunks[0].layers))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: replace(facts, groups={**facts.groups, "expert": (0, 4)}), "expert group 0 4 instead of 0 2"),
        (lambda facts: replace(facts, groups={**facts.groups, "data": (0,)}), "data group 0 instead of 0 2 4 ... 250"),
        (longer, "virtual stage 0: layer 1 has"),
        (moved, "virtual stage 0: layers"),
        (lambda facts: first_chunk(facts, symbols="M" * len(facts.chunks[0].symbols)), "virtual stage 0: layers MM"),
        (lambda facts: first_chunk(facts, others=0), "0 parameters outside of its layers instead of"),
        (lambda facts: replace(facts, chunks=facts.chunks[:1]), "1 virtual stages instead of 2"),
        (lambda facts: replace(facts, taps=()), "taps nothing instead of"),
    ],
)
def test_what_is_not_as_planned_is_said(plan, built, change, words):
    rank = 0 if "taps" not in words else 256
    report = compare(plan, place(plan.recipe), change(built[rank]))
    assert len(report.differences) == 1
    assert words in report.differences[0]


def test_facts_come_through_json(built):
    for facts in built.values():
        assert Facts.from_json(facts.as_json()) == facts


def answered(monkeypatch, *, code, out="", err=""):
    done = SimpleNamespace(returncode=code, stdout=out, stderr=err)
    monkeypatch.setattr(dry_build.subprocess, "run", lambda *args, **kwargs: done)


def test_a_rank_that_cannot_be_built_ends_in_its_reason(plan, built, monkeypatch):
    answered(monkeypatch, code=1, out=f"noise\n{BUILT}{built[0].as_json()}\n{REFUSED}{json.dumps('rank 3: no')}\n")
    with pytest.raises(UserError, match="rank 3: no") as caught:
        dry_build.dry_build(plan, (0, 3))
    assert "megacpp-stp plan" in caught.value.fix
    answered(monkeypatch, code=1, out=f"{REFUSED}{json.dumps('rank 3: no' + chr(10) + '  fix: say yes')}\n")
    with pytest.raises(UserError) as caught:
        dry_build.dry_build(plan, (0, 3))
    assert str(caught.value).count("fix:") == 1
    answered(monkeypatch, code=-9, err="one\nKilled")
    with pytest.raises(UserError, match="the process that builds ended: Killed"):
        dry_build.dry_build(plan, (0,))
    answered(monkeypatch, code=0, out=f"{BUILT}{built[0].as_json()}\n")  # says that all is well, and tells of one rank
    with pytest.raises(UserError, match="it gave no reason"):
        dry_build.dry_build(plan, (0, 3))


@pytest.mark.parametrize("rank", [-1, WORLD])
def test_a_rank_outside_of_the_world_is_refused(plan, rank):
    with pytest.raises(UserError, match="not in a world of 512 ranks") as caught:
        dry_build.dry_build(plan, (0, rank))
    assert caught.value.field == "--rank"


# --- the torch backend in te's place ----------------------------------------------------------------


def test_te_modules_are_refused_where_they_are_not(monkeypatch):
    monkeypatch.setattr(dry_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed here, so its modules cannot be built") as caught:
        require_buildable(load_recipe("nam56r"))
    assert "--backend torch" in caught.value.fix
    for change in on_torch(load_recipe("nam56r")):
        assert str(change) in caught.value.fix
    require_buildable(load_recipe("nam56r-tiny"))


@pytest.mark.parametrize("name", [name for name in list_recipes() if load_recipe(name).model.backend == "te"])
def test_a_te_recipe_has_the_same_layout_on_torch(name):
    recipe = load_recipe(name)
    changes = on_torch(recipe)
    assert [change.field for change in changes][0] == "model.backend"
    other = planned(name, *(change.override for change in changes))
    assert other.layout == planned(name).layout
    assert on_torch(other.recipe) == ()


def test_what_only_te_computes_again_is_left_out():
    modules = "training.recompute.modules=[layernorm]"
    changes = {change.field: change.becomes for change in on_torch(load_recipe("nam56r", (modules,)))}
    assert changes["training.recompute"] is None
    fp8 = "training.fp8={format: hybrid, scaling: tensorwise, amax_history: null, families: [E]}"
    changes = {change.field: change.becomes for change in on_torch(load_recipe("nam56r", (fp8,)))}
    assert changes["training.fp8"] is None
    assert changes["training.recompute.modules"] == ["core_attn", "mla_up_proj"]


# --- the command line -------------------------------------------------------------------------------


def test_the_command_tells_what_is_apart_and_what_was_changed(built, monkeypatch, capsys):
    overrides = (*TINY, "model.backend=te", "model.families.E.grouped_gemm=true", "stp.taps=[6,12]")
    build = Build(planned("nam56r-tiny", *overrides), "nam56r-tiny", overrides, ranks=(), backend=StandIn.TORCH)
    monkeypatch.setattr(dry_build, "_build", lambda plan, ranks: [built[rank] for rank in ranks])
    build.run()
    said = build.as_dict()
    assert (said["world_size"], said["as_planned"], build.apart) == (WORLD, False, 2)  # they have the tap, the plan not
    assert {change["field"] for change in said["changed"]} == {"model.backend", "model.families.E.grouped_gemm"}
    build.print()
    out = capsys.readouterr().out
    assert "rank 256: taps " in out and "final-norm instead of" in out
    assert "not what the recipe says: model.backend" in out
    assert "2 of 4 ranks are not as planned" in out
    json.dumps(said)


@pytest.mark.parametrize("option", [("--rank", "0"), ("--backend", "torch")])
def test_how_to_build_is_for_a_build(option):
    with pytest.raises(UserError, match="says how to build") as caught:
        CliRunner().invoke(build_app(["check"]), ["check", "nam56r-tiny", *option], catch_exceptions=False)
    assert caught.value.field == option[0]


# --- slower: other recipes, and real refusals -------------------------------------------------------


@pytest.mark.slow
def test_all_stages_of_a_full_size_recipe_on_64_nodes():
    recipe = load_recipe("nam56r", LARGE)
    plan = planned("nam56r", *LARGE, *(change.override for change in on_torch(recipe)))
    reports = dry_build.dry_build(plan)
    assert [report.rank for report in reports] == [0, 127, 128, 255, 256, 383, 384, 511]
    for report in reports:
        assert not report.differences and report.built == report.planned
    assert sum(len(report.taps) for report in reports[::2]) == len(plan.layout.tap_names)


@pytest.mark.slow
def test_te_modules_are_built_where_there_are_some(monkeypatch):
    """On a double that has their constructors; see `tests.te_double`."""
    monkeypatch.syspath_prepend(PATH)
    monkeypatch.setenv("PYTHONPATH", PATH, prepend=":")
    reports = dry_build.dry_build(planned("nam56r", *LARGE), (0, 511))
    assert not [difference for report in reports for difference in report.differences]


@pytest.mark.slow
def test_a_model_that_is_not_the_plans_is_told_apart(plan):
    pattern = plan.layout.megatron_pattern
    swapped = pattern[1] + pattern[0] + pattern[2:]
    arguments = tuple(
        replace(one, tokens=tuple(swapped if token == pattern else token for token in one.tokens))
        for one in plan.arguments
    )
    other = replace(plan, arguments=arguments)
    assert swapped != pattern and swapped in other.argv
    first, last = dry_build.dry_build(other, (0, WORLD - 1))
    assert "layers" in first.differences[0] and not last.differences


@pytest.mark.slow
def test_what_megatron_does_not_build_is_refused_in_its_words(plan):
    arguments = tuple(
        replace(one, tokens=("--num-experts", "3")) if "--num-experts" in one.tokens else one for one in plan.arguments
    )
    with pytest.raises(UserError, match="rank 0 of 512 cannot be built") as caught:
        dry_build.dry_build(replace(plan, arguments=arguments), (0, 511))
    assert "expert" in str(caught.value)
