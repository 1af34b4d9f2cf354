"""The automatic cut, against all cuts of small models, under memory limits that bind."""

import io
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan, fit_search, memory, schedule
from megacpp_stp.plan.checks import check
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.cuts import equal_stages, imbalance, stage_costs
from megacpp_stp.plan.fit_search import best_fitting_stages
from megacpp_stp.plan.fitting import GpuMemory
from megacpp_stp.plan.flops import block_costs
from megacpp_stp.plan.footprint import Footprint
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.memory import rank_memories
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.render import print_plan
from megacpp_stp.plan.schedule import held_at_once, peak_in_flight
from megacpp_stp.plan.stages import CutReport, choose_stages, cut_report
from megacpp_stp.recipe import load_recipe
from tests.recipes import STAND_INS
from tests.unit.test_cuts import every_cut, meets

SPARSE = (
    "model.families.A.sparse={ranks: [0, 2], indexer_heads: 2, indexer_head_dim: 32, topk: 16, "
    "kernel: upstream, loss: dense, loss_coeff: 0.01}"
)
MAMBA3 = (
    "model.families.M={block: mamba3, heads: 4, head_dim: 64, state_dim: 16, groups: 2, chunk_size: 16, "
    "complex_rotation: false, mimo_rank: 1, kernel: torch}"
)
PREDICTION = "model.mtp={depths: 1, pattern: AE, loss_coeff: 0.3}"
AUTO = ("parallel.stages=auto", "stp.taps=[12]")


def recipe_with(*overrides):
    return load_recipe(STAND_INS, (*AUTO, *overrides))


def best_by_brute_force(costs, cuts):
    def rank(stages):
        of_stages = stage_costs(costs, stages)
        return max(of_stages), sum(cost * cost for cost in of_stages), stages

    return min(cuts, key=rank, default=None)


def footprint(always, step, microbatch, again):
    return Footprint(
        elements=0,
        weights=always,
        gradients=0,
        state=0,
        step=step,
        activations=microbatch,
        dispatch=0,
        scores=0,
        logits=0,
        again=again,
        scores_again=0,
    )


@st.composite
def problems(draw):
    pipeline, virtual = draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (2, 2), (2, 3), (3, 2)]))
    blocks = draw(st.integers(pipeline * virtual, 10))
    size = st.integers(0, draw(st.sampled_from([2, 9])))
    again = st.sampled_from(draw(st.sampled_from([(0,), (0, 7), (0, 3, 9)])))
    found = [footprint(draw(size), draw(size), draw(size), draw(again)) for _ in range(blocks)]
    costs = draw(st.lists(st.integers(0, 9), min_size=blocks, max_size=blocks))
    needs = draw(st.lists(st.frozensets(st.integers(0, blocks - 1), min_size=pipeline), max_size=2))
    return costs, found, pipeline, virtual, needs, draw(st.integers(1, 3)) * pipeline, draw(st.integers(0, 7))


def peak(stages, found, *, pipeline, virtual, micro_batches):
    """From the definition: the largest rank's memory, over the whole schedule."""
    segment_of = [segment for segment, blocks in enumerate(stages) for _ in range(blocks)]
    peaks = []
    for rank in range(pipeline):
        mine = [(one, segment) for one, segment in zip(found, segment_of, strict=True) if segment % pipeline == rank]
        by_stage = [sum(one.microbatch for one, s in mine if s // pipeline == v) for v in range(virtual)]
        held, _ = peak_in_flight(by_stage, rank=rank, pipeline=pipeline, micro_batches=micro_batches)
        passes = held + max(one.again for one, _ in mine)
        peaks.append(sum(one.always for one, _ in mine) + max(passes, sum(one.step for one, _ in mine)))
    return max(peaks)


@settings(max_examples=1000, deadline=None)
@given(problems())
def test_the_fitting_cut_is_the_one_that_brute_force_finds(problem):
    costs, found, pipeline, virtual, needs, micro_batches, tightness = problem
    sizes = {"pipeline": pipeline, "virtual": virtual, "micro_batches": micro_batches}
    peaks = {cut: peak(cut, found, **sizes) for cut in every_cut(len(costs), pipeline * virtual)}
    cuts = [cut for cut in peaks if meets(cut, pipeline, needs)]
    # A limit that few cuts keep: the n-th smallest peak, which may be of none that meets the needs.
    capacity = sorted(set(peaks.values()))[min(tightness, len(set(peaks.values())) - 1)]
    fitting = [cut for cut in cuts if peaks[cut] <= capacity]
    gpu = GpuMemory(
        [[one] for one in found],
        moments=[held_at_once(rank=rank, **sizes) for rank in range(pipeline)],
        capacity=capacity,
    )
    assert [cut for cut in cuts if gpu.holds(cut)] == fitting
    expected = best_by_brute_force(costs, fitting)
    assert best_fitting_stages(costs, gpu, needs=needs) == expected
    if expected is not None:
        unlimited = max(stage_costs(costs, best_by_brute_force(costs, cuts)))
        assert best_fitting_stages(costs, gpu, at_least=unlimited, needs=needs) == expected


def allowed_cuts(recipe):
    """Cuts that the checks before a run let through, and the largest peak of each."""
    segments, found = recipe.parallel.pipeline * recipe.parallel.virtual, {}
    for cut in every_cut(recipe.model.depth, segments):
        layout = lower(recipe, stages=cut)
        try:
            check(recipe, layout)
        except UserError:
            continue
        ranks = rank_memories(recipe, layout, parts(recipe, layout))
        found[cut] = max(rank.peak_bytes for rank in ranks)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.virtual=2",),
        (SPARSE, PREDICTION),
        ("parallel.virtual=2", MAMBA3, PREDICTION),
        ("parallel.virtual=2", "training.recompute={granularity: full, modules: []}"),
        ("parallel.virtual=2", PREDICTION, "model.vocab_size=30000"),
        ("parallel.pipeline=3", "launch.processes_per_node=3", "training.global_batch_size=12"),
    ],
    ids=["plain", "virtual", "sparse", "virtual mamba3", "virtual, full recompute", "large head", "three ranks"],
)
def test_a_recipes_cut_is_the_best_of_those_that_fit(monkeypatch, overrides):
    recipe = recipe_with(*overrides)
    cuts, costs = allowed_cuts(recipe), block_costs(recipe)
    peaks = sorted(set(cuts.values()))
    unlimited = best_by_brute_force(costs, cuts)
    assert choose_stages(recipe) == unlimited
    binding = set()
    just_too_small = cuts[unlimited] - 1
    for capacity in (peaks[0], peaks[len(peaks) // 20], peaks[len(peaks) // 5], just_too_small, peaks[-1]):
        monkeypatch.setattr(memory, "H200_BYTES", capacity)
        expected = best_by_brute_force(costs, [cut for cut, peak in cuts.items() if peak <= capacity])
        assert choose_stages(recipe) == expected
        binding.add(expected)
    assert binding - {unlimited}


def test_what_fits_nowhere_gets_the_best_cut_and_memory_says_so(monkeypatch):
    recipe = recipe_with()
    best = choose_stages(recipe)
    monkeypatch.setattr(memory, "H200_BYTES", 1)
    assert choose_stages(recipe) == best


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 1), (2, 2), (2, 4), (4, 3)])
def test_a_schedule_repeats_after_a_few_groups_of_microbatches(monkeypatch, pipeline, virtual):
    sizes = {"pipeline": pipeline, "virtual": virtual, "micro_batches": 12 * pipeline}
    short = [held_at_once(rank=rank, **sizes) for rank in range(pipeline)]
    monkeypatch.setattr(schedule, "_ENOUGH_GROUPS", 100)
    assert [held_at_once(rank=rank, **sizes) for rank in range(pipeline)] == short


def test_a_search_that_grows_too_long_is_refused(monkeypatch):
    recipe = recipe_with("parallel.virtual=2")
    peaks = sorted(allowed_cuts(recipe).values())
    monkeypatch.setattr(memory, "H200_BYTES", peaks[0])
    monkeypatch.setattr(fit_search, "MOST_STEPS", 1)
    with pytest.raises(UserError, match="takes too long") as caught:
        choose_stages(recipe)
    assert caught.value.field == "parallel.stages"


def test_each_rank_gets_a_sparse_block_while_the_indexer_has_a_loss():
    recipe = recipe_with(SPARSE)
    with_loss, without = choose_stages(recipe), choose_stages(recipe_with(SPARSE.replace("0.01", "0")))
    assert with_loss[0] <= 8  # the second of them is the ninth block
    assert without == choose_stages(recipe_with(SPARSE.replace("0.01", "0").replace("0, 2", "0, 1")))
    one = recipe_with(SPARSE.replace("[0, 2]", "[0]"))
    with pytest.raises(UserError, match="every kind of block"):
        choose_stages(one)


def test_an_explicit_cut_wins_and_costs_no_import():
    recipe = load_recipe(STAND_INS, ("parallel.stages=[5, 7]",))
    assert choose_stages(recipe) == (5, 7)
    code = (
        "import sys\n"
        "from megacpp_stp.plan import build_plan\n"
        "from megacpp_stp.recipe import load_recipe\n"
        "build_plan(load_recipe('nam56r-tiny'))\n"
        "sys.exit(any(f'megacpp_stp.plan.{name}' in sys.modules for name in ('cuts', 'flops', 'memory', 'parameters')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_more_stages_than_blocks_is_an_error_of_ours():
    with pytest.raises(UserError, match="12 blocks do not fill 16 stages"):
        choose_stages(
            recipe_with("parallel.pipeline=16", "launch.processes_per_node=16", "training.global_batch_size=2")
        )


def test_the_report_compares_a_cut():
    recipe = load_recipe(STAND_INS, ("parallel.stages=[5, 7]",))
    costs, best = block_costs(recipe), choose_stages(recipe_with())
    equal = equal_stages(12, segments=2)
    assert cut_report(recipe, lower(recipe, stages=(5, 7))) == CutReport(
        stages=(5, 7),
        imbalance=imbalance(costs, (5, 7)),
        equal_stages=equal,
        equal_imbalance=imbalance(costs, equal),
        best_stages=best,
        best_imbalance=imbalance(costs, best),
    )
    chosen = cut_report(recipe_with(), lower(recipe_with(), stages=best))
    assert chosen.stages == chosen.best_stages == best
    assert 1 <= chosen.imbalance == chosen.best_imbalance < chosen.equal_imbalance


def test_equal_counts_that_leave_a_rank_without_what_it_needs_are_no_alternative():
    recipe = recipe_with("model.pattern=AEEAAA", "model.families.M=null", "model.families.R=null", "model.depth=6")
    layout = lower(recipe_at := recipe.model_copy(update={"stp": None}), stages=(2, 4))
    report = cut_report(recipe_at, layout)
    assert equal_stages(6, segments=2) == (3, 3)
    assert report.equal_stages is None
    assert report.best_stages == (2, 4)


def test_a_model_that_no_cut_can_hold_is_cut_by_compute_alone():
    recipe = load_recipe("nam56r-pp2-vpp2", ["model.depth=1500", "model.families.A.sparse=null"])
    stages = choose_stages(recipe)
    assert sum(stages) == 1500
    assert cut_report(recipe, lower(recipe, stages=stages)).imbalance < 1.01


def test_an_explicit_cut_is_planned_though_the_best_one_takes_too_long(monkeypatch):
    def too_long(recipe):
        raise UserError("takes too long to find", field="parallel.stages")

    monkeypatch.setattr("megacpp_stp.plan.stages.best_cut", too_long)
    plan = build_plan(load_recipe(STAND_INS))
    report = cut_report(plan.recipe, plan.layout)
    assert (report.best_stages, report.best_imbalance) == (None, None)
    assert cost_of(plan).cuts.keys() == {"recipe", "equal"}
    page = io.StringIO()
    print_plan(plan, Console(file=page, width=200))
    assert "takes too long to find" in page.getvalue()
