"""The page of a matrix: its verdict on top, what may not be compared not compared, and never out of date."""

import re
from types import SimpleNamespace

import pytest

from megacpp_stp.ablate import code, page, session
from megacpp_stp.ablate.figure import effects_plot
from megacpp_stp.ablate.own_page import MARK, put_page
from megacpp_stp.ablate.record import write_page
from megacpp_stp.ablate.session import run_matrix
from megacpp_stp.ablate.state import list_tasks
from megacpp_stp.ablate.verdict import complete_runs, judge_matrix, judge_runs
from megacpp_stp.errors import UserError
from megacpp_stp.runs.invalid import invalidate
from tests.unit.made_matrix import CONTENT, leave, planned
from tests.unit.made_runs import CODE, SUBSTRATE
from tests.unit.test_ablate_verdict import better_of
from tests.unit.test_runs_report_page import Page

OTHER_MACHINE = {"substrate": {**SUBSTRATE, "python": "3.13.0"}}
TWO = {"factors": {"spans": CONTENT["factors"]["spans"]}, "baseline": {"spans": "1"}}
MINUS = "\N{MINUS SIGN}"


def made(tmp_path, *, change=lambda run: {}, leave_out=(), **changes):
    """A matrix with its runs, and its page."""
    matrix, runs = planned(tmp_path, **changes)
    for run in runs:
        if run.name not in leave_out:
            leave(run, **{"better": better_of(run) if "gate" in run.levels else 0.0, **change(run)})
    return SimpleNamespace(matrix=matrix, runs=runs, place=tmp_path / "runs", text=text_of(matrix, runs))


def text_of(matrix, runs):
    found, missing = complete_runs(runs)
    return page.matrix_page(matrix, found, judge_runs(matrix, found, missing=missing))


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take seconds; without matplotlib there are none."""

    def refuse():
        raise UserError("needs matplotlib: none", field="x", fix="pip install 'megacpp-stp[plots]'")

    monkeypatch.setattr(page, "require_matplotlib", refuse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("matplotlib")
    return made(tmp_path_factory.mktemp("whole"))


def test_the_verdict_comes_first(whole):
    found = Page(whole.text)
    for words in (
        "controlled matrix: lm_loss, iterations 21 to 40",
        "nam56r-tiny: spans (1, 3) x gate (early, late), seeds 1, 2, 3. Baseline: spans=1,gate=early.",
        f"spans: 3 against 1 cannot be told: lm_loss {MINUS}0.04 nats a token",
        "gate: late against early is worse: lm_loss +0.1 nats a token",
        "its sign is not the same in all cells",
        f"1: {MINUS}0.05, 2: {MINUS}0.07, 3: ",  # what each seed has to say of three spans
        "Student's t over 3 seeds",
        "controlled: only stp.start_step differs",
        "A spans=1,gate=early and 2 more seeds",
        "What differs",
        "stp.n_spans",
    ):
        assert words in found.words, words
    headings = re.findall(r"<h2>([^<]*)</h2>", whole.text)
    assert headings[:4] == ["Verdict", "Main effects", "Cells", "Runs"]
    figures = [attrs for tag, attrs in found.tags if tag == "svg"]
    assert [attrs["class"] for attrs in figures] == ["wide", "narrow"] * 6
    assert "Main effects on lm loss" in figures[0]["aria-label"]
    assert f"{MINUS}0.04".replace(MINUS, "-") in figures[0]["aria-label"]
    assert len(found.ids) == len(set(found.ids)) and set(found.used) <= set(found.ids)
    assert "://" not in whole.text and "<script" not in whole.text
    rows = re.findall(r'class="arm"[^>]*>(\w)</td>', whole.text)
    assert rows == ["A"] * 3 + ["B"] * 3 + ["C"] * 3 + ["D"] * 3


def test_the_same_runs_give_the_same_page(whole):
    assert text_of(whole.matrix, whole.runs) == whole.text


def test_what_may_not_be_compared_is_not_shown_as_if_it_were(tmp_path, no_figures):
    """A cell that ran on another machine is named with the reason, and is no arm beside the baseline."""
    found = made(tmp_path, change=lambda run: OTHER_MACHINE if run.cell == "spans=3,gate=late" else {})
    words = Page(found.text).words
    assert "NOT COMPARED in spans, gate" in words
    assert "spans=3,gate=late is not shown with the baseline: the runs are unlike in substrate" in words
    runs = found.text.partition("<h2>Runs</h2>")[2].partition("<footer>")[0]
    assert "spans=3,gate=early" in runs and "spans=3,gate=late" not in runs
    assert "UNLIKE" not in words


def test_what_the_matrix_itself_made_unlike_is_shown_and_labelled(tmp_path, no_figures):
    factors = {"batch": {"small": [], "large": ["training.global_batch_size=16"]}}
    words = Page(made(tmp_path, factors=factors, baseline={"batch": "small"}).text).words
    assert "NOT CONTROLLED in batch: lm_loss, iterations 1 to 40" in words
    assert "not controlled, unlike batch" in words and "B batch=large" in words


def test_without_a_verdict_the_page_says_why(tmp_path, no_figures):
    other = {**CODE, "sha256": "d" * 64}
    found = made(tmp_path, change=lambda run: {"code": other} if run.seed == 2 else {}, **TWO)
    words = Page(found.text).words
    assert "NO VERDICT" in words and "not all made by one code" in words
    assert "Main effects" not in words and "Runs" not in words


def test_few_seeds_make_no_level_better_on_the_page(tmp_path, no_figures):
    words = Page(made(tmp_path, seeds=[1], change=lambda run: {"better": better_of(run)}).text).words
    assert "is higher within this seed, no verdict over seeds" in words
    assert "is better" not in words and "is worse" not in words


def test_text_of_files_stays_text(tmp_path, no_figures):
    matrix, runs = planned(tmp_path, **TWO)
    for run in runs:
        leave(run)
    invalidate(runs[3].directory, "<b>read</b> & wrong")
    text = text_of(matrix, runs)
    assert "<b>" not in text and "spans=3 seed 2 is INVALID: <b>read</b> & wrong" in Page(text).words


def test_damaged_values_leave_the_verdict_on_the_page(tmp_path, no_figures):
    """What cannot be drawn must not leave an older page in its place."""
    words = Page(made(tmp_path, change=lambda run: {"speed": 1e20}, **TWO).text).words
    assert "spans: 3 against 1" in words and "Nothing more of the runs: tokens_per_s 1e+20 of iteration 1" in words


@pytest.mark.parametrize("narrow", [False, True])
def test_the_figure_says_that_few_seeds_are_no_verdict(tmp_path, narrow):
    """Cut off at the end of the row it would say "lower" alone."""
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    matrix, runs = planned(tmp_path, **TWO, seeds=[1, 2])
    for run in runs:
        leave(run, better=0.1 * (run.cell == "spans=3"))
    effects_plot(judge_matrix(matrix, runs)).draw(figure, narrow)
    assert "spans: 3 against 1: lower, no verdict over seeds" in [text.get_text() for text in figure.axes[0].texts]


def test_what_no_axis_holds_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = made(tmp_path, change=lambda run: {"loss": lambda i: 1e20 * run.plan.recipe.stp.n_spans}, **TWO)
    assert "<svg" not in found.text and "No curves: lm_loss 1e+20 of iteration" in Page(found.text).words


@pytest.fixture
def started(tmp_path, monkeypatch, no_figures):
    """A complete matrix whose page was written by a start of its own."""
    monkeypatch.setattr(code, "code_hash", lambda: CODE["sha256"])
    found = made(tmp_path, **TWO)

    def start(matrix=found.matrix, runs=found.runs):
        tasks = list_tasks(runs, directory=found.place, resume=True)
        return run_matrix(matrix, runs, tasks, directory=found.place, say=print)

    return SimpleNamespace(**vars(found), file=found.place / "report.html", start=start, first=start())


def test_a_run_that_is_marked_leaves_the_page(started):
    assert started.first.page == f"page: {started.file}"
    before = started.file.read_text()
    assert "is INVALID" not in before and "6 runs" not in before
    invalidate(started.runs[3].directory, "read the wrong data")
    started.start()
    found = Page(started.file.read_text())
    assert "INCOMPLETE, 5 of 6 runs count" in found.words
    assert "spans=3 seed 2 is INVALID: read the wrong data. Left out of all that follows." in found.words
    assert found.words.count("spans=3 seed 2") == 1
    assert "2 seeds" in found.words
    assert [path.name for path in started.place.iterdir() if path.name.startswith(".report")] == []


def test_a_base_that_is_marked_leaves_no_comparison(started):
    for run in started.runs:
        if run.cell == "spans=1":
            invalidate(run.directory, "read the wrong data")
    started.start()
    words = Page(started.file.read_text()).words
    assert (
        "INCOMPLETE, 3 of 6 runs count" in words and "cannot be told: no seed has all of these runs complete" in words
    )


def test_seeds_that_are_added_come_onto_the_page(started, tmp_path, monkeypatch):
    matrix, runs = planned(tmp_path, **TWO, seeds=[1, 2, 3, 4])
    told = []

    def run_tasks(tasks, *, say, after_each):
        told.append(Page(started.file.read_text()).words)
        for task in tasks:
            if task.is_open:
                leave(task.run)
        return session.Ended()

    monkeypatch.setattr(session, "check_tasks", lambda tasks: None)
    monkeypatch.setattr(session, "run_tasks", run_tasks)
    assert started.start(matrix, runs).status == 0
    assert "INCOMPLETE, 6 of 8 runs count" in told[0]  # while they run
    words = Page(started.file.read_text()).words
    assert "spans=3 seed 4" in words and "Student's t over 4 seeds" in words


@pytest.mark.parametrize("kind", ["edited", "foreign", "link", "folder"])
def test_what_is_not_ours_is_left_and_named(started, kind, tmp_path):
    other = tmp_path / "other.html"
    other.write_text("mine")
    text = started.file.read_text()
    started.file.unlink()
    if kind == "edited":
        started.file.write_text(text.replace("<h2>Verdict</h2>", "<h2>Verdict, as I see it</h2>"))
    elif kind == "foreign":
        started.file.write_text("mine")
    elif kind == "link":
        started.file.symlink_to(other)
    else:
        started.file.mkdir()
    before = started.file.read_bytes() if kind != "folder" else None
    invalidate(started.runs[3].directory, "read the wrong data")
    outcome = started.start()
    assert outcome.page.startswith("no page: ") and "is left as it is (it may say what is no longer so" in outcome.page
    assert kind == "folder" or started.file.read_bytes() == before
    assert started.file.is_symlink() == (kind == "link") and other.read_text() == "mine"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    put_page(path, f"<p>one</p>{MARK}")
    one = path.read_bytes()
    assert b"one" in one and MARK.encode() not in one

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        put_page(path, f"<p>two</p>{MARK}")
    assert path.read_bytes() == one and [item.name for item in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    put_page(path, f"<p>two</p>{MARK}")
    assert b"two" in path.read_bytes()


def test_a_place_that_cannot_be_written_to_is_no_page(whole, no_figures, tmp_path):
    found, missing = complete_runs(whole.runs)
    verdict = judge_runs(whole.matrix, found, missing=missing)
    said = write_page(whole.matrix, found, verdict, directory=tmp_path / "none")
    assert said.startswith("no page: ") and "No such file or directory" in said
