"""A matrix that is begun, stopped, edited and gone on with: what is run, kept and refused."""

import io
import json
import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from megacpp_stp.ablate import code, execute, session
from megacpp_stp.ablate.cost import seconds_left
from megacpp_stp.ablate.execute import check_tasks, run_tasks
from megacpp_stp.ablate.session import run_matrix
from megacpp_stp.ablate.state import Step, device_of, list_tasks, strangers
from megacpp_stp.ablate.verdict import judge_matrix
from megacpp_stp.cli.ablate_tables import print_outcome
from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.invalid import invalidate
from megacpp_stp.runs.lock import launcher_lock
from megacpp_stp.runs.watch import clock
from tests.unit.made_matrix import CONTENT, leave, planned
from tests.unit.made_runs import CODE, make_run

TWO = {"factors": {"spans": CONTENT["factors"]["spans"]}, "baseline": {"spans": "1"}, "seeds": [1, 2]}


@pytest.fixture(autouse=True)
def this_code(monkeypatch):
    """This code is the one that made runs say they were made by."""
    monkeypatch.setattr(code, "code_hash", lambda: CODE["sha256"])


@pytest.fixture
def matrix(tmp_path):
    """The matrix, its four runs, and where they go."""
    wanted, runs = planned(tmp_path, **TWO)
    return SimpleNamespace(wanted=wanted, runs=runs, place=tmp_path / "runs", folder=tmp_path)


class MadeLaunch:
    """Leaves a run as a launch would, in place of one that takes a minute."""

    def __init__(self, task, *, statuses, log):
        self._task, self._statuses, self._log = task, statuses, log

    def preflight(self):
        self._log.append(("check", self._task.run.name))

    def run(self):
        run = self._task.run
        self._log.append((self._task.step.value, run.name))
        status = self._statuses.get(run.name, 0)
        if status == "interrupt":
            raise KeyboardInterrupt
        if self._task.step is Step.BEGIN:
            early = {"complete": False, "iterations": 0 if status == 2 else 30} if status else {}
            leave(run, better=0.1 * (run.cell == "spans=3"), **early)
        return status


@pytest.fixture
def made(monkeypatch):
    """What is launched, and the statuses that launches end with."""
    found = SimpleNamespace(log=[], statuses={})
    for name in ("write_page", "renew_page"):
        monkeypatch.setattr(session, name, lambda *_, **__: "no page")  # it takes seconds
    monkeypatch.setattr(execute, "launch_of", lambda task: MadeLaunch(task, statuses=found.statuses, log=found.log))
    return found


def steps(tasks):
    return [(task.run.name, task.step.value, task.from_iteration) for task in tasks]


def run_all(matrix, *, resume=False):
    tasks = list_tasks(matrix.runs, directory=matrix.place, resume=resume)
    lines = []
    return run_matrix(matrix.wanted, matrix.runs, tasks, directory=matrix.place, say=lines.append), lines


def test_a_new_matrix_runs_all_and_says_what_it_found(matrix, made):
    outcome, lines = run_all(matrix)
    order = ["spans=1 seed 1", "spans=3 seed 1", "spans=1 seed 2", "spans=3 seed 2"]
    assert [name for what, name in made.log if what == "begin"] == order
    # Each cell once before the first run starts, then each run before it starts.
    assert made.log[:3] == [("check", order[0]), ("check", order[1]), ("check", order[0])]
    assert outcome.status == 0 and outcome.failed == ()
    assert outcome.verdict.sentences[0].startswith("spans: 3 against 1 is lower within these 2 seeds, no verdict")
    assert read_json(matrix.place / "ablation.json") == json.loads(json.dumps(outcome.content))
    assert outcome.content["status"] == "complete"
    assert [row["directory"] for row in outcome.content["runs"]][:2] == ["spans=1/1", "spans=3/1"]
    assert any("[4/4] spans=3 seed 2: complete in 0:00" in line for line in lines)
    assert any("3 left, about 0:00 at the speed so far" in line for line in lines)


def test_the_record_says_what_is_complete_so_far(matrix, made, monkeypatch):
    """A matrix takes hours, and may be killed in any of them."""
    found, launch_of = [], execute.launch_of

    def looked(task):
        if task.run.directory != matrix.runs[0].directory:
            found.append([row["status"] for row in read_json(matrix.place / "ablation.json")["runs"]])
        return launch_of(task)

    monkeypatch.setattr(session, "check_tasks", lambda _: None)
    monkeypatch.setattr(execute, "launch_of", looked)
    run_all(matrix)
    assert found == [["complete"] * done + ["not run"] * (4 - done) for done in (1, 2, 3)]


def test_a_complete_matrix_has_nothing_left_to_do(matrix, made):
    first, _ = run_all(matrix)
    files = {path: path.read_bytes() for path in matrix.place.rglob("*") if path.is_file()}
    made.log.clear()
    again, _ = run_all(matrix, resume=True)
    assert made.log == [] and again.status == 0
    assert again.verdict == first.verdict
    assert {path: path.read_bytes() for path in matrix.place.rglob("*") if path.is_file()} == files
    assert device_of(matrix.place) == "cpu" and device_of(matrix.folder) is None


def test_what_is_there_is_not_begun_again_without_being_asked(matrix, made):
    run_all(matrix)
    with pytest.raises(UserError, match="exists already"):
        list_tasks(matrix.runs, directory=matrix.place, resume=False)
    with pytest.raises(UserError, match="is no directory"):
        list_tasks(matrix.runs, directory=matrix.folder / "nowhere", resume=True)
    with pytest.raises(UserError, match="is a run and no matrix"):
        list_tasks(matrix.runs, directory=matrix.runs[0].directory, resume=True)


def test_a_signal_stops_the_matrix_and_it_goes_on_from_there(matrix, made):
    made.statuses["spans=3 seed 1"] = 130
    outcome, _ = run_all(matrix)
    assert outcome.status == 130 and outcome.failed == ("spans=3 seed 1",)
    assert [name for what, name in made.log if what == "begin"] == ["spans=1 seed 1", "spans=3 seed 1"]
    assert outcome.content["status"] == "incomplete"
    assert [row["status"] for row in outcome.content["runs"]] == ["complete", "incomplete", "not run", "not run"]
    assert outcome.verdict.missing[0] == "spans=3 seed 1 is incomplete: killed by a test"
    tasks = list_tasks(matrix.runs, directory=matrix.place, resume=True)
    # No checkpoint was written before the kill: `launch --resume` would begin anew, too.
    assert steps(tasks) == [
        ("spans=1 seed 1", "keep", None),
        ("spans=3 seed 1", "go on", 0),
        ("spans=1 seed 2", "begin", None),
        ("spans=3 seed 2", "begin", None),
    ]


def test_a_run_goes_on_from_its_checkpoint(matrix):
    leave(matrix.runs[0], complete=False, iterations=35)
    folder = matrix.runs[0].directory / "checkpoints" / "iter_0000030"
    folder.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt"):
        (folder / name).write_text("{}")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("30")
    assert list_tasks(matrix.runs, directory=matrix.place, resume=True)[0].from_iteration == 30


def test_ctrl_c_between_two_runs_stops_the_matrix(matrix, made):
    made.statuses["spans=1 seed 2"] = "interrupt"
    outcome, _ = run_all(matrix)
    assert outcome.status == 130 and outcome.failed == ()
    assert read_json(matrix.place / "ablation.json")["status"] == "incomplete"
    # The receipts of both runs of the first seed are there, and that is what the verdict is of.
    assert [effect.contrast.seeds for effect in outcome.verdict.effects] == [(1,)]


def test_ctrl_c_while_cells_are_checked_writes_nothing(matrix, made, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MadeLaunch, "preflight", interrupt)
    outcome, _ = run_all(matrix)
    assert outcome.status == 130
    assert not matrix.place.exists()


def test_ctrl_c_while_cells_are_checked_leaves_the_files_of_another_start_alone(matrix, made, monkeypatch):
    """It has not got the lock: whoever has it may be writing."""
    made.statuses["spans=3 seed 1"] = 130
    run_all(matrix)
    (matrix.place / "ablation.json").write_text("{}")

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MadeLaunch, "preflight", interrupt)
    monkeypatch.setattr(session, "write_page", lambda *_, **__: pytest.fail("wrote a page"))
    with launcher_lock(matrix.place):
        outcome, _ = run_all(matrix, resume=True)
    assert (outcome.status, outcome.page) == (130, "nothing was written")
    assert (matrix.place / "ablation.json").read_text() == "{}"


def test_a_run_that_diverges_is_left_and_the_others_run(matrix, made):
    made.statuses["spans=3 seed 1"] = 1
    outcome, lines = run_all(matrix)
    assert outcome.status == 1 and outcome.failed == ("spans=3 seed 1",)
    assert len([what for what, _ in made.log if what == "begin"]) == 4
    assert any("ended with status 1" in line and "killed by a test" in line for line in lines)
    assert outcome.verdict.effects[0].contrast.seeds == (2,)


def test_a_run_that_ends_before_its_first_iteration_stops_the_matrix(matrix, made):
    made.statuses["spans=1 seed 1"] = 2
    outcome, _ = run_all(matrix)
    assert outcome.status == 2
    assert [what for what, _ in made.log].count("begin") == 1
    assert outcome.verdict.refused == "no run is complete yet"


def test_a_cell_that_this_machine_cannot_run_is_refused_before_anything_is_written(matrix, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(UserError) as caught:
        check_tasks(list_tasks(matrix.runs, directory=matrix.place, resume=False))
    assert caught.value.field == "cell spans=1: OMP_NUM_THREADS"
    assert not matrix.place.exists()


def test_an_edited_matrix_is_refused_with_what_differs(matrix, tmp_path):
    for run in matrix.runs[:2]:
        leave(run)
    spans = {"1": ["stp.n_spans=1"], "3": ["stp.n_spans=4"]}
    _, edited = planned(tmp_path, **{**TWO, "factors": {"spans": spans}})
    with pytest.raises(UserError) as caught:
        list_tasks(edited, directory=matrix.place, resume=True)
    assert caught.value.field == "cell spans=3 seed 1"
    assert "stp.n_spans: 3 in the run, 4 here" in caught.value.problem
    _, edited = planned(tmp_path, **{**TWO, "set": [*CONTENT["set"], "stp.weight=0.5"]})
    with pytest.raises(UserError, match="stp.weight: 0.02 in the run, 0.5 here") as caught:
        list_tasks(edited, directory=matrix.place, resume=True)
    assert "and 1 more runs: spans=3 seed 1" in caught.value.problem


OTHER = {**CODE, "sha256": "d" * 64}


@pytest.mark.parametrize("which", ["complete", "stopped", "an attempt"])
def test_other_code_goes_on_with_no_matrix(matrix, made, which):
    """An edit between a stop and --resume, before hours are spent on runs that would not count."""
    made.statuses["spans=3 seed 1"] = 130
    run_all(matrix)
    place = matrix.runs[1 if which == "stopped" else 0].directory
    receipt = read_json(place / "receipt.json") | {"code": OTHER}
    if which == "an attempt":
        place = place / "attempt-1"
        place.mkdir()
    write_json(place / "receipt.json", receipt)
    with pytest.raises(UserError, match="was not made by this code of megacpp-stp, cccccccccccc") as caught:
        list_tasks(matrix.runs, directory=matrix.place, resume=True)
    assert caught.value.field == f"cell spans={3 if which == 'stopped' else 1} seed 1: code"
    assert caught.value.value == "d" * 12 and "--run-dir" in caught.value.fix


def test_code_matters_only_where_something_is_left_to_run(matrix, made, monkeypatch):
    run_all(matrix)
    monkeypatch.setattr(code, "code_hash", lambda: OTHER["sha256"])
    assert {task.step for task in list_tasks(matrix.runs, directory=matrix.place, resume=True)} == {Step.KEEP}
    invalidate(matrix.runs[0].directory, "read the wrong data")
    list_tasks(matrix.runs, directory=matrix.place, resume=True)


def test_a_run_that_ended_before_it_said_its_code_may_go_on(matrix, made):
    run_all(matrix)
    for run, steps_on in ((matrix.runs[1], True), (matrix.runs[0], False)):
        receipt = read_json(run.directory / "receipt.json") | {"code": None}
        write_json(run.directory / "receipt.json", receipt | ({"status": "incomplete"} if steps_on else {}))
        if steps_on:
            assert list_tasks(matrix.runs, directory=matrix.place, resume=True)[1].step is Step.GO_ON
        else:
            with pytest.raises(UserError, match="was not made by this code") as caught:
                list_tasks(matrix.runs, directory=matrix.place, resume=True)
            assert caught.value.value == "does not say"


def test_code_that_is_changed_between_two_runs_stops_the_matrix(matrix, made, monkeypatch):
    hashes = iter(["c" * 64] * 3 + ["d" * 64])
    monkeypatch.setattr(execute, "code_hash", lambda: next(hashes))
    pages = []
    monkeypatch.setattr(session, "write_page", lambda _, runs, *__, **___: pages.append(len(runs)) or "page")
    with pytest.raises(UserError, match="was changed since this start began") as caught:
        run_all(matrix)
    assert caught.value.field == "cell spans=1 seed 2: code"
    # What is done is written down all the same.
    told = read_json(matrix.place / "ablation.json")
    assert [row["status"] for row in told["runs"]] == ["complete", "complete", "not run", "not run"]
    assert told["verdict"]["refused"] is None and pages == [2]


def test_a_matrix_may_grow_and_what_it_no_longer_has_is_named(matrix, made, tmp_path):
    run_all(matrix)
    spans = {**CONTENT["factors"]["spans"], "5": ["stp.n_spans=5"]}
    _, more = planned(tmp_path, **{**TWO, "factors": {"spans": spans}, "seeds": [1, 3]})
    tasks = list_tasks(more, directory=matrix.place, resume=True)
    assert [task.step.value for task in tasks] == ["keep", "keep", "begin", "begin", "begin", "begin"]
    assert strangers(more, directory=matrix.place) == ("spans=1/2", "spans=3/2")


def test_a_directory_that_is_no_run_or_cannot_go_on_is_refused_by_name(matrix, tmp_path):
    place = matrix.runs[0].directory
    place.mkdir(parents=True)
    (place / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no run") as caught:
        list_tasks(matrix.runs, directory=matrix.place, resume=True)
    assert caught.value.field.startswith("cell spans=1 seed 1: ")
    (place / "notes.txt").unlink()
    place.rmdir()
    leave(matrix.runs[0], complete=False)
    plan = read_json(place / "plan.json")
    plan["recipe"]["training"]["seed"] = 5
    (place / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="it was edited"):
        list_tasks(matrix.runs, directory=matrix.place, resume=True)


def test_a_run_that_was_killed_as_it_began_begins_in_its_directory(matrix):
    place = matrix.runs[0].directory
    place.mkdir(parents=True)
    for name in (".launcher.lock", "plan.json"):
        (place / name).touch()
        first, *_ = list_tasks(matrix.runs, directory=matrix.place, resume=True)
        assert (first.step.value, first.from_iteration) == ("begin", 0)


def test_without_checkpoints_a_complete_run_is_kept_and_a_killed_one_refused(tmp_path):
    settings = [*CONTENT["set"], "training.checkpoint=null"]
    _, runs = planned(tmp_path, **{**TWO, "set": settings})
    for run, complete in zip(runs[:2], (True, False), strict=True):
        overrides = run.plan.recipe.overrides[len(CONTENT["set"]) :]
        make_run(run.directory, *overrides, complete=complete)
    with pytest.raises(UserError, match="saves nothing to go on from") as caught:
        list_tasks(runs, directory=tmp_path / "runs", resume=True)
    assert caught.value.field == "cell spans=3 seed 1: training.checkpoint"
    assert list_tasks(runs[:1], directory=tmp_path / "runs", resume=True)[0].step is Step.KEEP


def test_an_invalid_run_is_neither_run_again_nor_counted(matrix, made):
    made.statuses["spans=3 seed 2"] = 1  # it could go on
    run_all(matrix)
    invalidate(matrix.runs[3].directory, "read the wrong data")
    made.log.clear()
    outcome, _ = run_all(matrix, resume=True)
    assert made.log == [] and outcome.status == 0
    assert outcome.verdict.missing == outcome.verdict.invalid == ("spans=3 seed 2 is INVALID: read the wrong data",)
    assert outcome.verdict.open == ()
    console = Console(file=io.StringIO(), width=200)
    print_outcome(outcome, matrix.place, console)
    assert "go on:" not in console.file.getvalue()
    assert outcome.content["runs"][3]["status"] == "INVALID"
    assert outcome.verdict.effects[0].contrast.seeds == (1,)


def test_a_run_that_cannot_be_read_is_named_and_not_counted(matrix, made):
    run_all(matrix)
    lines = (matrix.runs[3].directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (matrix.runs[3].directory / "metrics.jsonl").write_text("".join([lines[0], "no record\n", *lines[1:]]))
    outcome, _ = run_all(matrix, resume=True)
    assert "spans=3 seed 2 cannot be read" in outcome.verdict.missing[0]
    assert outcome.verdict.effects[0].contrast.seeds == (1,)
    for run in matrix.runs:
        (run.directory / "receipt.json").write_text("{}")
    verdict = judge_matrix(matrix.wanted, matrix.runs)
    assert verdict.refused == "no run is complete yet" and len(verdict.missing) == 4
    rows = session.as_dict(matrix.wanted, matrix.runs, verdict, directory=matrix.place)["runs"]
    assert [row["status"] for row in rows] == ["unreadable"] * 4


def test_two_starts_in_one_directory_are_refused(matrix, made):
    run_all(matrix)
    with launcher_lock(matrix.place), pytest.raises(UserError, match="is going on there"):
        run_all(matrix, resume=True)


def test_time_left_is_what_the_finished_runs_took(matrix, made):
    tasks = list_tasks(matrix.runs, directory=matrix.place, resume=False)
    assert seconds_left(tasks) is None
    for run in matrix.runs[:2]:
        leave(run)
        receipt = read_json(run.directory / "receipt.json")
        receipt["attempts"][0] |= {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:01:30+00:00"}
        write_json(run.directory / "receipt.json", receipt)
    tasks = list_tasks(matrix.runs, directory=matrix.place, resume=True)
    assert seconds_left(tasks) == pytest.approx(2 * 90)
    assert [clock(seconds) for seconds in (0.4, 75, 3600, 7384.6)] == ["0:00", "1:15", "1:00:00", "2:03:05"]


def test_a_matrix_is_run_through_the_products_own_launch(matrix):
    launch = execute.launch_of(list_tasks(matrix.runs, directory=matrix.place, resume=False)[1])
    assert launch.plan.digest == matrix.runs[1].plan.digest
    assert launch.run_dir == matrix.place / "spans=3" / "1" and launch.from_iteration is None
    assert os.fspath(launch.run_dir) in launch.shell()
    assert run_tasks([], say=print, after_each=print).status == 0
