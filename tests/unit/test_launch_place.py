"""The directory of a launch: new, one in which nothing has run, or that of a run; and dry runs, which say the same."""

import json
import os
import signal

import pytest

from megacpp_stp.cli import main
from megacpp_stp.cli.app import run as command
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.attempts import find_continuation
from megacpp_stp.runs.begun import not_new, nothing_has_run
from megacpp_stp.runs.files import write_json
from megacpp_stp.runs.lock import launcher_lock, rank_lock
from megacpp_stp.runs.receipt import Receipt, plan_facts, read_receipt
from megacpp_stp.training import launcher
from megacpp_stp.training.launcher import Launch

PLAN = build_plan(load_recipe("nam56r-tiny"), device="cpu")
OTHER = build_plan(load_recipe("nam56r-tiny", ("training.seed=7",)), device="cpu")
LOCKS = (".launcher.lock", ".ranks.lock")
ALL = (*LOCKS, "plan.json", ".plan.json.7", ".receipt.json.123456")
CPU = ("launch", "nam56r-tiny", "--device", "cpu")
NODES = ("--nnodes", "2", "--set", "launch.processes_per_node=1", "--rdzv-endpoint", "host:29500")


def killed(*words, **more):
    raise KeyboardInterrupt


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A launch without its ranks; `at` is the rename at which it is killed."""

    def begin(*, at=None, plan=PLAN, **more):
        renames, replace = [], os.replace

        def counted(source, target):
            renames.append(target)
            if len(renames) == at:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            patch.setattr(launcher, "run_torchrun", lambda *words, **more: -signal.SIGKILL)
            return Launch(plan=plan, run_dir=tmp_path / "run", **more).run()

    return begin


def tree(path):
    return {found: (found.lstat().st_mtime_ns, found.is_file() and found.read_bytes()) for found in path.rglob("*")}


# --- a launcher that was killed before its receipt ----------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_launcher_killed_before_its_receipt_can_be_resumed(tmp_path, start, monkeypatch, at):
    """Before it took the lock, wrote the plan, or the receipt."""
    directory = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == 0:
            patch.setattr(launcher, "launcher_lock", killed)
        start(at=at or None)
    assert not (directory / "receipt.json").exists()
    assert (directory / "plan.json").exists() == (at == 2)
    assert nothing_has_run(directory)
    for half in directory.glob(".*.json.*"):
        half.rename(half.with_suffix(".1"))  # of a process that is gone
    left = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert find_continuation(directory, PLAN.as_dict(), may_change=False) == 0
    assert start(from_iteration=0) == 1
    receipt = read_receipt(directory)
    assert [attempt["from_iteration"] for attempt in receipt["attempts"]] == [0]
    assert json.loads((directory / "plan.json").read_text()) == PLAN.as_dict()
    assert {name: (directory / name).read_bytes() for name in left} == left
    assert not nothing_has_run(directory)


def test_another_plan_than_the_one_left_there_is_refused(tmp_path, start):
    with pytest.raises(KeyboardInterrupt):
        start(at=2)
    with pytest.raises(UserError, match="training.seed: 1234 in the run, 7 here"):
        find_continuation(tmp_path / "run", OTHER.as_dict(), may_change=True)


@pytest.mark.parametrize("names", [(), LOCKS[:1], LOCKS, ALL])
def test_what_a_start_writes_first_is_no_run(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert nothing_has_run(tmp_path)
    error = not_new(tmp_path)
    assert ("nothing has run there" in error.problem, "--resume" in error.fix) == (True, True)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "receipt.json",
        "checkpoints/",
        ".plan.json",
        ".plan.json.x",
        "plan.json.bak",
        ".launcher-1.lock",
        "plan.json/",
    ],
)
def test_a_foreign_file_is_never_taken_for_ours(tmp_path, start, name):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / LOCKS[0]).touch()
    (directory / name).mkdir() if name.endswith("/") else (directory / name).write_text("mine")
    before = tree(directory)
    assert not nothing_has_run(directory)
    for more in ({"from_iteration": 0}, {}):
        with pytest.raises(UserError) as caught:
            start(**more)
        assert "begin there" not in caught.value.fix
    assert tree(directory).items() >= {path: what for path, what in before.items() if path.name != LOCKS[0]}.items()


@pytest.mark.parametrize("name", ALL[1:])
def test_what_lies_there_without_the_first_lock_is_not_ours(tmp_path, name):
    (tmp_path / name).touch()
    assert not nothing_has_run(tmp_path)
    assert "--resume" not in not_new(tmp_path).fix
    (tmp_path / LOCKS[0]).symlink_to(tmp_path / name)
    assert not nothing_has_run(tmp_path)


def test_a_run_that_came_meanwhile_is_not_overwritten(tmp_path, start, monkeypatch):
    """Somebody else begins between the making of the directory and its lock."""
    lock = launcher.launcher_lock

    def late(directory):
        Receipt.create(directory, plan_facts(OTHER.as_dict()))
        return lock(directory)

    monkeypatch.setattr(launcher, "launcher_lock", late)
    with pytest.raises(UserError, match="exists already"):
        start()
    assert read_receipt(tmp_path / "run")["plan_digest"] == OTHER.digest


# --- dry runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run directory by what lies there."""
    monkeypatch.chdir(tmp_path)

    def make(kind):
        directory = tmp_path / "run"
        if kind == "nowhere":
            return directory
        if kind == "dangling":
            directory.symlink_to(tmp_path / "gone")
            return directory
        directory.mkdir()
        if kind == "begun":
            (directory / LOCKS[0]).touch()
        elif kind == "foreign":
            (directory / "notes.txt").write_text("mine")
        elif kind in ("run", "unsaved", "complete"):
            overrides = ("training.checkpoint=null",) if kind == "unsaved" else ()
            plan = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu").as_dict()
            write_json(directory / "plan.json", plan)
            receipt = Receipt.create(directory, plan_facts(plan))
            if kind == "complete":
                receipt.complete(iterations_done=plan["recipe"]["training"]["iterations"])
        return directory

    return make


def dry(capsys, *words):
    status = command([*CPU, "--run-dir", "run", *words, "--dry-run", "--format", "json"])
    said = capsys.readouterr()
    return status, said.out, said.err


SEED = ("--set", "training.seed=7")


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("empty", (), "--run-dir: exists already, and nothing has run there"),
        ("begun", (), "begin there by the same command with --resume"),
        ("foreign", (), "--run-dir: exists already, and holds no run"),
        ("dangling", (), "--run-dir: is a link to nothing"),
        ("run", (), "--run-dir: exists already"),
        ("nowhere", ("--resume",), "--run-dir: is no directory"),
        ("foreign", ("--resume",), "cannot be read"),
        ("run", ("--resume", *SEED), "training.seed: 1234 in the run, 7 here"),
        ("run", ("--resume", *SEED, "--allow-plan-change"), "training.seed: 1234 in the run, 7 here"),
        ("unsaved", ("--resume", "--set", "training.checkpoint=null"), "training.checkpoint: is null"),
    ],
)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_dry_run_refuses_what_the_launch_would_refuse(tmp_path, place, capsys, kind, words, says, rank):
    directory = place(kind)
    before = tree(tmp_path)
    nodes = () if rank is None else (*NODES, "--node-rank", str(rank))
    status, out, err = dry(capsys, *words, *nodes)
    if nodes and kind in ("run", "unsaved") and words:
        says = "launch.nodes: 1 in the run, 2 here"
    assert (status, out, says in err) == (2, "", True), err
    if rank != 1:  # node 1 asks node 0 first
        launched = command([*CPU, "--run-dir", "run", *words, *nodes])
        assert (launched, says in capsys.readouterr().err) == (2, True)
    assert tree(tmp_path) == before
    assert os.path.lexists(directory) == (kind != "nowhere")


@pytest.mark.parametrize("lock", [launcher_lock, rank_lock])
def test_a_dry_run_refuses_a_run_that_is_going_on(tmp_path, place, capsys, lock):
    with lock(place("run")):
        before = tree(tmp_path)
        status, _, err = dry(capsys, "--resume")
        assert (status, "the run is going on there" in err) == (2, True)
        assert tree(tmp_path) == before


def test_a_run_that_is_going_on_is_told_before_what_takes_seconds(place, capsys, monkeypatch):
    monkeypatch.setattr(Launch, "check", killed)
    with launcher_lock(place("run")):
        assert command([*CPU, "--run-dir", "run", "--resume"]) == 2
    assert "the run is going on there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("run", "no checkpoint yet: begins anew"),
        ("begun", "begins there from iteration 0"),
        ("complete", "nothing to do"),
    ],
)
def test_a_dry_run_of_what_can_go_on_says_where(tmp_path, place, capsys, kind, says):
    place(kind)
    before = tree(tmp_path)
    status, out, err = dry(capsys, "--resume")
    assert (status, says in err) == (0, True)
    if kind == "complete":
        assert out == ""
    else:
        facts = json.loads(out)
        assert facts["from_iteration"] == 0
        assert ("run/attempt-1" in facts["files"], "run/attempt-0" in facts["files"]) == (kind == "run", False)
    assert tree(tmp_path) == before


def test_what_a_resume_changes_of_the_plan_is_listed(tmp_path, place, capsys):
    place("run")
    assert "changes" not in dry(capsys, "--resume")[2]
    before = tree(tmp_path)
    status, _, err = dry(capsys, "--resume", "--allow-plan-change", "--set", "training.log_interval=3")
    assert (status, tree(tmp_path)) == (0, before)
    assert "changes the run's plan:\n  training.log_interval: 10 in the run, 3 here\n" in err


def test_a_dry_run_of_a_node_to_which_a_run_is_offered_is_no_mistake(tmp_path, place, capsys):
    directory = place("begun")
    status, _, err = dry(capsys, *NODES, "--node-rank", "1")
    assert (status, "exists already" in err) == (2, True)
    (directory / "nodes").mkdir()
    write_json(directory / "nodes" / "0.json", {"state": "offered"})
    assert dry(capsys, *NODES, "--node-rank", "1")[0] == 0


def test_a_directory_without_a_plan_needs_the_recipe(place, capsys):
    place("begun")
    assert command(["launch", "--resume", "--run-dir", "run", "--dry-run"]) == 2
    assert "RECIPE: is needed: nothing has run in run" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [(), ("nam56r-tiny",)])
def test_a_directory_that_the_system_refuses_to_look_at_is_a_mistake_and_no_crash(capsys, recipe):
    assert command(["launch", *recipe, "--resume", "--run-dir", "x" * 300]) == 2
    assert "--run-dir: cannot be read: File name too long" in capsys.readouterr().err


def test_ctrl_c_before_the_command_is_there_shows_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["megacpp-stp", *CPU])
    monkeypatch.setattr("megacpp_stp.cli.app.build_app", killed)
    assert main() == 130
    assert capsys.readouterr().err == ""
