"""`megacpp-stp runs show FOLDER` and `runs invalidate`."""

import fcntl
import json
import os
import re
import threading

import pytest

from megacpp_stp.cli.app import run
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.lock import launcher_lock
from tests.unit.made_runs import SUBSTRATE, answer, loss_of, make_run, refused, runs


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs"
    make_run(folder / "a", "stp=null", validation={20: 3.0, 40: 4.0})
    make_run(folder / "b", iterations=10, complete=False)
    make_run(
        folder / "c",
        "stp.weight=0",
        substrate={**SUBSTRATE, "hardware": {"device": "cpu", "gpu": "NVIDIA H200"}},
    )
    (folder / "notes").mkdir()
    (folder / "file").write_text("x")
    return folder


def rows(folder):
    return {run["name"]: run for run in json.loads(answer("show", folder, "--format", "json"))["runs"]}


def test_a_folder_is_a_row_for_each_run(folder):
    found = rows(folder)
    assert list(found) == ["a", "b", "c"]
    a, b, c = found.values()
    assert (a["status"], a["stp"], a["regime"], a["iterations_done"]) == ("complete", "none", None, 40)
    assert a["best_validation"] == {"lm_loss": 3.0, "iteration": 20}
    assert a["last_lm_loss"] == loss_of(40)
    assert (b["status"], b["stp"], b["regime"]) == ("incomplete", "0.02 from 11", "dormant")
    assert (b["iterations_done"], b["iterations_planned"], b["parallelism"]) == (10, 40, "PP2")
    assert (b["substrate"], c["substrate"], c["stp"]) == ("cpu", "2 x NVIDIA H200", "measured")
    text = answer("show", folder)
    for words in ("runs in", "10/40", "3 @ 20", "0.02 from 11", "dormant", "PP2", "directories that are no runs: 1"):
        assert words in text, words


def test_one_run_is_shown_as_before(folder):
    assert "run directory:" in answer("show", folder / "a")
    assert json.loads(answer("show", folder / "a", "--format", "json"))["invalid"] is None
    assert "is neither a run directory nor a folder of them" in refused("show", folder / "notes").problem
    refused("show", folder / "nowhere")


def test_a_run_that_only_measures_stp_has_no_gate(folder):
    phases = json.loads(answer("show", folder / "c", "--format", "json"))["phases"]
    assert list(phases) == ["whole run"] and "gate" not in answer("show", folder / "c")
    assert phases["whole run"]["stp_loss"] == {"first": 0.5, "last": 0.5}


def test_a_run_that_is_going_on_is_in_the_table(folder):
    """Its metrics end in a torn line, or before the first is whole."""
    with (folder / "b" / "metrics.jsonl").open("a") as handle:
        handle.write('{"iteration": 11, "lm_lo')
    assert rows(folder)["b"]["iterations_done"] == 10
    (folder / "b" / "metrics.jsonl").write_text('{"iterat')
    assert (rows(folder)["b"]["iterations_done"], rows(folder)["b"]["regime"]) == (0, None)
    (folder / "b" / "metrics.jsonl").unlink()
    assert rows(folder)["b"]["last_lm_loss"] is None
    answer("show", folder)


def test_while_its_launcher_is_there_a_run_is_said_to_go_on(folder):
    run = folder / "b"
    receipt = read_json(run / "receipt.json")
    write_json(run / "receipt.json", {**receipt, "ended": None})

    def said():
        facts = json.loads(answer("show", run, "--format", "json"))
        assert (rows(folder)["b"]["running"], rows(folder)["b"]["unseen"]) == (facts["running"], facts["unseen"])
        tables = re.sub(r"\s+", " ", answer("show", folder)), re.sub(r"\s+", " ", answer("show", run))
        return facts["status"], facts["running"], *("running" in text for text in tables), *tables

    not_seen = "incomplete: no launcher of it is seen on this machine: it was killed, or runs on another machine"
    *found, table, one = said()
    assert found == ["incomplete", False, False, False] and f"b is {not_seen}" in table and not_seen in one
    with launcher_lock(run):
        *found, table, one = said()
        assert found == ["incomplete", True, True, True] and "incomplete" not in table + one
    assert said()[1] is False  # looking has left no lock, and the file that was locked is still there
    write_json(run / "receipt.json", receipt)
    with launcher_lock(run):  # its end is written down: the launcher only has not let go yet
        *found, table, one = said()
    assert found == ["incomplete", False, False, False] and "incomplete: killed by a test" in one
    assert "b is incomplete: killed by a test" in table


def test_where_locks_cannot_be_seen_a_run_is_not_called_dead(folder):
    run = folder / "b"
    write_json(run / "receipt.json", {**read_json(run / "receipt.json"), "ended": None})
    (run / ".launcher.lock").symlink_to(".launcher.lock")
    assert rows(folder)["b"]["running"] is None
    assert "whether its launcher is still there cannot be seen from here" in re.sub(r"\s+", " ", answer("show", run))


def test_a_launcher_that_begins_while_somebody_looks_is_not_refused(folder):
    run = folder / "b"
    handle = os.open(run / ".launcher.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as one who looks does, for much longer
    let_go = threading.Timer(0.05, os.close, [handle])
    let_go.start()
    with launcher_lock(run):
        pass
    let_go.join()


def test_a_run_without_an_iteration_has_no_empty_table(folder):
    (folder / "b" / "metrics.jsonl").unlink()
    text = answer("show", folder / "b")
    assert text[text.index("nam56r-tiny: incomplete") :].splitlines()[1].startswith("validation after")


def test_only_the_end_of_a_long_file_is_read(folder):
    path = folder / "a" / "metrics.jsonl"
    path.write_bytes(b"x" * 2**20 + b"\n" + path.read_bytes())
    assert rows(folder)["a"]["iterations_done"] == 40


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("receipt.json", None, "receipt.json: cannot be read"),
        ("receipt.json", "{", "receipt.json: is not JSON"),
        ("receipt.json", '{"receipt_version": 0}', "receipt.json: is a receipt of another version than 1 and 2"),
        ("metrics.jsonl", "\0" * 500_000, "metrics.jsonl: ends in no metrics record"),
        ("metrics.jsonl", "{}\n{}\n", "metrics.jsonl: ends in no metrics record"),
    ],
)
def test_what_cannot_be_read_has_a_row_with_the_reason(folder, name, content, says):
    path = folder / "b" / name
    path.unlink() if content is None else path.write_text(content)
    assert rows(folder)["b"]["unreadable"].startswith(says)
    assert f"b is unreadable: {says}" in answer("show", folder)


# INVALID


def test_an_invalid_run_leaves_every_table_loudly(folder):
    receipt = (folder / "a" / "receipt.json").read_bytes()
    assert "is INVALID: wrong data" in answer("invalidate", folder / "a", "--reason", "wrong data")
    assert (folder / "a" / "receipt.json").read_bytes() == receipt
    assert rows(folder)["a"] == {"name": "a", "status": "INVALID", "invalid": "wrong data"}
    text = answer("show", folder)
    assert "a is INVALID: wrong data" in text
    assert "3 @ 20" not in text
    text = answer("show", folder / "a")
    assert text.startswith(" INVALID: wrong data ")
    assert "lm loss" not in text
    shown = json.loads(answer("show", folder / "a", "--format", "json"))
    assert shown == {"directory": str(folder / "a"), "status": "INVALID", "invalid": "wrong data"}
    for more in ((), ("--assert-equal",), ("--allow-unlike",)):
        error = refused("compare", folder / "c", folder / "a", *more)
        assert error.problem == "is INVALID: wrong data"


def test_a_run_is_invalidated_once(folder):
    invalidate = ("invalidate", folder / "a", "--reason")
    answer(*invalidate, "wrong data")
    said = (folder / "a" / "invalid.json").read_bytes()
    assert "INVALID already" in answer(*invalidate, "wrong data")
    error = refused(*invalidate, "another reason")
    assert "marked already: wrong data" in error.problem
    assert (folder / "a" / "invalid.json").read_bytes() == said
    assert sorted(os.listdir(folder / "a")) == ["invalid.json", "metrics.jsonl", "plan.json", "receipt.json"]


def test_a_damaged_run_can_be_invalidated(folder):
    (folder / "b" / "receipt.json").write_text("{")
    answer("invalidate", folder / "b", "--reason", "cut off")
    assert rows(folder)["b"]["status"] == "INVALID"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"reason": 7}', '{"reason": ""}', "\0", "null"])
def test_a_mark_that_cannot_be_read_is_a_mark(folder, content):
    (folder / "a" / "invalid.json").write_text(content)
    assert rows(folder)["a"]["invalid"] == "(the reason cannot be read)"
    refused("compare", folder / "c", folder / "a")
    refused("invalidate", folder / "a", "--reason", "wrong data")


def test_a_mark_that_points_nowhere_is_a_mark(folder, tmp_path):
    (folder / "a" / "invalid.json").symlink_to(tmp_path / "precious")
    assert rows(folder)["a"]["status"] == "INVALID"
    refused("invalidate", folder / "a", "--reason", "wrong data")
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "\x1b[2J", "x" * 500])
def test_a_reason_is_one_line_for_people(folder, reason):
    assert refused("invalidate", folder / "a", "--reason", reason).field == "--reason"


def test_only_runs_are_invalidated(folder, tmp_path):
    for path in (folder, folder / "notes", folder / "file", folder / "nowhere"):
        assert "holds no receipt.json" in refused("invalidate", path, "--reason", "x").problem
    assert runs("invalidate", folder / "a").exit_code == 2


def test_nothing_in_a_name_reaches_the_terminal(folder):
    os.rename(folder / "a", folder / "\x1b[2Ja")
    write_json(folder / "b" / "invalid.json", {"reason": "\x1b[2Jgone"})
    receipt = read_json(folder / "c" / "receipt.json")
    receipt["substrate"]["hardware"]["gpu"] = "\x1b[2JGPU"
    write_json(folder / "c" / "receipt.json", receipt)
    assert not re.search("[^\x20-\x7e\n\u2500-\u257f]", answer("show", folder))
    assert "\x1b" not in answer("show", folder / "\x1b[2Ja")


def test_nothing_in_a_message_reaches_the_terminal(folder, capsys):
    """Some name a file as it is called."""
    hostile = folder / "\x1b[2Ja"
    os.rename(folder / "a", hostile)
    (hostile / "metrics.jsonl").write_text("{}\n{}\n")
    assert run(["runs", "compare", str(folder / "b"), str(hostile)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "u001b[2Ja/metrics.jsonl: line 1 is not a metrics record" in said
