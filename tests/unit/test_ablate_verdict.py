"""What a matrix says of its runs: arithmetic, pooling of seeds, and when it says nothing."""

import io
import json
import math
import statistics

import pytest
from rich.console import Console

from megacpp_stp.ablate.contrast import contrast
from megacpp_stp.ablate.session import Outcome
from megacpp_stp.ablate.verdict import judge_matrix
from megacpp_stp.ablate.words import sentence_words
from megacpp_stp.cli.ablate_tables import print_outcome
from megacpp_stp.runs.compare import compare_runs
from megacpp_stp.runs.difference import interval_of
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.recorded import read_run
from megacpp_stp.runs.window import Window
from tests.unit.made_matrix import CONTENT, leave, planned
from tests.unit.made_runs import CODE, DATA, GATE, ITERATIONS, SUBSTRATE, loss_of, noise

FIRST = GATE + 11  # both gates are open
# What each cell's loss is less than the baseline's: 0.1 for three spans; a late gate costs 0.05, with three spans 0.15.
BETTER = {"spans=1,gate=early": 0.0, "spans=3,gate=early": 0.1, "spans=1,gate=late": -0.05, "spans=3,gate=late": -0.05}
JITTER = {1: 0.0, 2: 0.02, 3: -0.05}  # what a seed adds to what three spans bring


def better_of(run):
    return BETTER[run.cell] + (JITTER[run.seed] if run.levels["spans"] == "3" else 0.0)


def judge(tmp_path, *, change=lambda run: {}, **changes):
    matrix, runs = planned(tmp_path, **changes)
    for run in runs:
        leave(run, **{"better": better_of(run), **change(run)})
    return judge_matrix(matrix, runs)


def printed(found, tmp_path):
    """What a person reads of it."""
    console = Console(width=240, record=True, file=io.StringIO())
    outcome = Outcome(status=0, failed=(), verdict=found, content={}, page="no page")
    print_outcome(outcome, tmp_path / "runs", console)
    return console.export_text()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of the whole matrix."""
    return judge(tmp_path_factory.mktemp("whole"))


def test_cells_are_means_over_seeds_and_compared_with_the_baseline(found):
    assert (found.window.first, found.window.last) == (FIRST, ITERATIONS)
    assert found.refused is None and found.missing == ()
    base, late, spans, both = found.cells
    window = range(FIRST, ITERATIONS + 1)
    means = [math.fsum(loss_of(i, seed) for i in window) / len(window) for seed in (1, 2, 3)]
    assert base.is_baseline and base.against_baseline is None
    assert base.by_seed == pytest.approx(means)
    assert base.mean == pytest.approx(statistics.fmean(means)) and base.spread == pytest.approx(statistics.stdev(means))
    assert spans.against_baseline.by_seed == pytest.approx([-0.1, -0.12, -0.05])
    assert spans.against_baseline.difference == pytest.approx(-0.09)
    assert spans.against_baseline.relative == pytest.approx(-0.09 / base.mean)
    # Student's t by hand: two degrees of freedom, 4.302653 for 95 %.
    half = 4.302653 * statistics.stdev([0.1, 0.12, 0.05]) / math.sqrt(3)
    interval = spans.against_baseline.interval
    assert (interval.low, interval.high) == pytest.approx((-0.09 - half, -0.09 + half), abs=1e-6)
    assert half < 0.09 and spans.against_baseline.verdict == "better"
    assert late.against_baseline.verdict == "worse" and late.against_baseline.difference == pytest.approx(0.05)
    assert both.against_baseline.standing == "controlled: only stp.n_spans, stp.start_step differ"
    assert base.parameters == 5


def test_a_main_effect_is_the_mean_over_the_other_factors_levels(found):
    spans, gate = found.effects
    assert (spans.factor, spans.level, spans.against) == ("spans", "3", "1")
    assert spans.contrast.pairs == (
        ("spans=1,gate=early", "spans=3,gate=early"),
        ("spans=1,gate=late", "spans=3,gate=late"),
    )
    assert spans.contrast.by_pair == pytest.approx([-0.09, 0.01])
    assert spans.contrast.by_seed == pytest.approx([-0.05, -0.07, 0.0])
    assert spans.contrast.difference == pytest.approx(-0.04)
    assert spans.contrast.method == "Student's t over 3 seeds"
    assert spans.contrast.verdict == "cannot be told"
    assert gate.contrast.by_pair == pytest.approx([0.05, 0.15])
    assert gate.contrast.difference == pytest.approx(0.1)
    assert gate.contrast.verdict == "worse"
    assert found.sentences[0].startswith("spans: 3 against 1 cannot be told: lm_loss -0.04 nats a token")
    assert found.sentences[1].startswith("gate: late against early is worse: lm_loss +0.1 nats a token")
    assert all("3 seeds, mean over 2 pairs of cells" in sentence for sentence in found.sentences)
    assert "spans 3: its sign is not the same in all cells, see their table" in found.notes
    assert "2 levels are judged, and no interval is widened for their number" in found.notes


@pytest.mark.parametrize("seeds", [(1,), (1, 2), (1, 2, 3)])
def test_a_cell_against_the_baseline_is_what_runs_compare_says(tmp_path, seeds):
    two = {"factors": {"spans": CONTENT["factors"]["spans"]}, "baseline": {"spans": "1"}, "seeds": list(seeds)}
    matrix, runs = planned(tmp_path, **two)
    for run in runs:
        place = int(run.levels["spans"])
        leave(run, loss=lambda i, s=run.seed, place=place: loss_of(i, s) + 0.03 * noise(i, s * place) - 0.004 * place)
    mine = judge_matrix(matrix, runs).cells[1].against_baseline
    theirs = compare_runs([run.directory for run in sorted(runs, key=lambda run: run.cell)])
    (pair,) = theirs.pairs
    for name in ("seeds", "by_seed", "difference", "relative", "interval", "method", "controlled", "standing"):
        assert getattr(mine, name) == getattr(pair, name), name
    words = {"lower": "better", "higher": "worse", "no difference shown": "cannot be told"}
    assert mine.within == pair.verdict
    assert mine.verdict == (words[pair.verdict] if len(seeds) >= 3 else "no verdict over seeds")


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_without_enough_seeds_no_level_is_better(tmp_path, seeds):
    """The interval is over iterations, and each word says that it is of these runs alone."""
    found = judge(tmp_path, seeds=list(seeds))
    spans, gate = (effect.contrast for effect in found.effects)
    these = "this seed" if len(seeds) == 1 else "these 2 seeds"
    assert "moving blocks" in gate.method and ("of 1 seed" if len(seeds) == 1 else "mean of 2 seeds") in gate.method
    assert {spans.verdict, gate.verdict} == {"no verdict over seeds"}
    assert (spans.within, gate.within) == ("lower", "higher")
    assert (
        f"gate: late against early is higher within {these}, no verdict over seeds: lm_loss +0." in found.sentences[1]
    )
    assert "95% interval over iterations +0." in found.sentences[1]
    assert any("says nothing of other seeds" in note for note in found.notes)
    text = printed(found, tmp_path)
    told = [*found.sentences, text, json.dumps(found.as_dict())]
    assert not any(word in words for words in told for word in ("better", "worse"))
    assert f"within {these}, no verdict over seeds" in " ".join(text.split())


def test_too_few_iterations_are_no_interval(tmp_path):
    _, runs = planned(tmp_path, seeds=[1])
    recorded = {(run.cell, 1): read_run(leave(run, better=better_of(run)), name=run.name) for run in runs[:2]}
    values = {run: run.values_of("lm_loss") for run in recorded.values()}
    window = Window(iterations=tuple(range(FIRST, FIRST + 6)), why="as asked for")
    found = contrast([(runs[0].cell, runs[1].cell)], recorded, values=values, window=window)
    assert (found.verdict, found.within, found.interval) == ("no verdict over seeds", "no interval", None)
    assert "no interval: 6 iterations of 1 seed, too few for one" in sentence_words(found, metric="lm_loss")
    interval, method = interval_of([[0.5] * 11])
    assert interval is None and method == "11 iterations of 1 seed, too few for one"


def test_the_window_is_of_all_cells_whichever_seed_of_them_is_complete(tmp_path):
    """The first run alone has no other cell of its seed: that does not make STP the same in all."""
    matrix, runs = planned(tmp_path)
    for run in runs:
        if run.seed > 1 or run.cell == "spans=1,gate=early":
            leave(run, better=better_of(run))
    found = judge_matrix(matrix, runs)
    assert (found.window.first, found.window.last) == (FIRST, ITERATIONS)


OTHER_CODE = {**CODE, "sha256": "d" * 64, "commit": "a" * 40}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (OTHER_CODE, "dddddddddddd, commit aaaaaaaaaaaa: "),
        ({**OTHER_CODE, "commit": None}, "dddddddddddd: "),
        (None, "does not say: "),
    ],
)
@pytest.mark.parametrize("which", [lambda run: run.levels["gate"] == "late", lambda run: run.seed == 3])
def test_runs_of_unlike_code_are_not_pooled(tmp_path, code, words, which):
    """Not over seeds, and not over pairs of cells of which each was made by one code."""
    found = judge(tmp_path, change=lambda run: {"code": code} if which(run) else {})
    assert (
        "were not all made by one code of megacpp-stp, and are not pooled (cccccccccccc, commit bbbb" in found.refused
    )
    assert words in found.refused and "runs, as " in found.refused
    assert (found.cells, found.effects, found.sentences, found.window) == ((), (), (), None)


def test_code_that_changed_on_the_way_or_that_nobody_knows_is_not_pooled(tmp_path):
    (tmp_path / "unknown").mkdir()
    unknown = judge(tmp_path / "unknown", change=lambda run: {"code": None})
    assert "(does not say: 12 runs, as spans=1,gate=early seed 1)" in unknown.refused
    matrix, runs = planned(tmp_path)
    for run in runs:
        leave(run)
    for run in runs:  # all of them alike: no run is of one code
        earlier = run.directory / "attempt-1"
        earlier.mkdir()
        write_json(earlier / "receipt.json", read_json(run.directory / "receipt.json") | {"code": OTHER_CODE})
    refused = judge_matrix(matrix, runs).refused
    assert "(cccccccccccc after dddddddddddd, commit bbbbbbbbbbbb: 12 runs, as spans=1,gate=early seed 1)" in refused


def test_seeds_that_are_missing_leave_only_what_is_whole(tmp_path):
    def change(run):
        stopped = run.seed == 3 or (run.seed == 2 and run.cell == "spans=3,gate=late")
        return {"complete": False, "iterations": 35} if stopped else {}

    found = judge(tmp_path, change=change)
    spans, gate = found.effects
    assert spans.contrast.seeds == gate.contrast.seeds == (1,)
    assert found.cells[2].against_baseline.seeds == (1, 2)
    assert len(found.missing) == 5
    assert "spans=3,gate=late seed 2 is incomplete: killed by a test" in found.missing
    assert found.cells[3].seeds == (1,) and found.cells[3].spread is None


def test_a_cell_without_a_complete_run_cannot_be_told(tmp_path):
    matrix, runs = planned(tmp_path)
    for run in runs:
        if run.cell != "spans=3,gate=late":
            leave(run, better=better_of(run))
    found = judge_matrix(matrix, runs)
    assert found.cells[3].mean is None
    assert found.cells[3].against_baseline.refused == "no seed has all of these runs complete"
    assert [effect.contrast.verdict for effect in found.effects] == ["cannot be told"] * 2
    assert "cannot be told: no seed has all of these runs complete" in found.sentences[0]
    assert len(found.missing) == 3 and all("not run yet" in line for line in found.missing)


def test_nothing_is_said_of_iterations_before_the_gates(tmp_path):
    """A window that the plans allow and the runs did not reach."""
    matrix, runs = planned(tmp_path)
    for run in runs:
        leave(run, better=better_of(run))
    base, late = runs[0], runs[1]
    recorded = {(run.cell, run.seed): read_run(run.directory, name=run.name) for run in (base, late)}
    values = {run: run.values_of("lm_loss") for run in recorded.values()}
    window = Window(iterations=tuple(range(1, GATE + 1)), why="as asked for")
    found = contrast([(base.cell, late.cell)], recorded, values=values, window=window)
    assert found.verdict == "cannot be told" and "lies wholly before the gate" in found.refused
    window = Window(iterations=tuple(range(1, GATE + 2)), why="as asked for")
    assert contrast([(base.cell, late.cell)], recorded, values=values, window=window).refused is None


def test_a_window_before_one_gate_is_named(tmp_path):
    found = judge(tmp_path, window=":25")
    assert "spans=1,gate=late: the iterations are 20 dormant, 5 active" in found.notes
    assert "spans=1,gate=early: the iterations are 10 dormant, 15 active" in found.notes


def test_what_differs_besides_stp_is_not_controlled_and_what_was_asked_for_is_only_labelled(tmp_path):
    factors = {
        "rate": {"low": [], "high": ["optimizer.lr=4e-3"]},
        "batch": {"small": [], "large": ["training.global_batch_size=16"]},
    }
    baseline = {"rate": "low", "batch": "small"}
    matrix, runs = planned(tmp_path, factors=factors, baseline=baseline)
    for run in runs:
        leave(run, better=0.1 * run.seed)
    found = judge_matrix(matrix, runs)
    rate, batch = (effect.contrast for effect in found.effects)
    assert not rate.controlled and rate.standing == "not controlled: optimizer.lr differs"
    assert not batch.controlled and batch.standing == "not controlled, unlike batch"
    assert batch.refused is None
    assert "; not controlled, unlike batch" in found.sentences[1]
    # They differ in no STP: the window is all there is.
    assert (found.window.first, found.window.last) == (1, ITERATIONS)


@pytest.mark.parametrize(
    "change", [{"substrate": {**SUBSTRATE, "python": "3.13.0"}}, {"data": {**DATA, "source_sha256": "zz"}}]
)
def test_runs_that_became_unlike_on_their_own_are_not_compared(tmp_path, change):
    found = judge(tmp_path, change=lambda run: change if run.levels["spans"] == "3" else {})
    spans, gate = found.effects
    kind = next(iter(change))
    assert f"unlike in {kind}, and not because of the matrix" in spans.contrast.refused
    assert spans.contrast.verdict == "cannot be told" and spans.contrast.difference is None
    assert gate.contrast.refused is None
    # Seeds of one cell that are unlike are no one cell.
    (tmp_path / "again").mkdir()
    found = judge(tmp_path / "again", change=lambda run: change if run.seed == 2 else {})
    assert "differ in more than their seeds" in found.refused
    assert found.effects == () and found.window is None


def test_the_answer_is_plain_data_and_a_table(found, tmp_path):
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["effects"][0]["contrast"]["by_pair"] == pytest.approx([-0.09, 0.01])
    assert plain["window"] == {
        "first": FIRST,
        "last": ITERATIONS,
        "iterations": ITERATIONS - FIRST + 1,
        "why": "STP has all of its weight in each run that has it",
    }
    text = printed(found, tmp_path)
    for words in (
        "lm_loss, iterations 21 to 40",
        "spans=1,gate=late",
        "-0.09 (",
        "baseline",
        "worse",
        "gate: late against early is worse",
        "controlled: only stp.start_step differs",
    ):
        assert words in text, words
    assert "--resume" not in text


def test_bits_a_byte_are_compared_as_such(tmp_path):
    found = judge(tmp_path, metric="bits_per_byte")
    assert found.effects[1].contrast.difference == pytest.approx(0.1 / 3)
    assert "bits_per_byte +0.03333 bits a byte" in found.sentences[1]
