"""Run directories that somebody broke, or made for us: every command that reads them answers or says what is wrong.

No traceback, no waiting, nothing started, nothing written. Beside test_runs_hostile.py, which looks harder at single
values in what comparisons read: here any file of a run may be anything, and all readers are asked.
"""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager, redirect_stdout, suppress

import pytest
from typer.main import get_command

from megacpp_stp.ablate import code
from megacpp_stp.ablate.page import matrix_page
from megacpp_stp.ablate.record import as_dict
from megacpp_stp.ablate.state import list_tasks
from megacpp_stp.ablate.verdict import complete_runs, judge_matrix
from megacpp_stp.cli.app import build_app
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.runs.invalid import invalidate
from megacpp_stp.runs.report import build_report
from megacpp_stp.runs.report_files import plots_of
from megacpp_stp.runs.report_page import page
from megacpp_stp.runs.tail import Tail
from tests.unit.made_matrix import leave, planned
from tests.unit.made_runs import CODE
from tests.unit.test_runs_hostile import PIECES, VALUES, paths_of, replaced

EFFORT = [pytest.param(100, id="quick"), pytest.param(10_000, id="thorough", marks=pytest.mark.slow)]
PROGRAM = get_command(build_app(["runs", "diff", "ablate", "launch"]))
LONGEST_S = 60  # a reader that waits for ever is stopped then; no speed is tested
DRAWN_EACH = 100  # a page takes a second
FILES = (
    *("receipt.json", "metrics.jsonl", "plan.json", "exit.json", "invalid.json", "attempt-1/receipt.json"),
    *("error-0.json", "hang.json", "hang-0.json", "ranks.json", "patches.json", "env.json"),
    *("checkpoints/iter_0000012/metadata.json", "checkpoints/latest_checkpointed_iteration.txt"),
)
FOREIGN = (
    b"#!/bin/sh\ntouch pwned\n",
    b"<!doctype html><title>404</title>",
    b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    b"!!python/object/apply:os.system ['true']",
    b'{"name": "left-pad", "version": "1.0.0"}',
    b'{"iteration": 1}',
    b'{"__class__": "os.system", "receipt_version": 2, "recipe": {"name": "../../etc/passwd"}}',
    b"[" * 100_000 + b"]" * 100_000,
    b'{"receipt_version": ' + b"9" * 4000 + b"}",
    b'{"receipt_version": 2, "status": NaN, "started": Infinity}',
)
HARMLESS = ("/dev/null", "/dev/zero", "/proc/")  # reading some of these is what is tested
STARTED = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
CHANGED = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink")


class Witness:
    """Sees what this process starts, opens for writing, or changes, while it looks."""

    def __init__(self):
        self.looking, self.seen = False, []
        sys.addaudithook(self._hook)  # stays for as long as the process

    def _hook(self, event, arguments):
        if not self.looking:
            return
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes and str(arguments[0]).startswith(HARMLESS):
            return
        if writes or event in STARTED or event in CHANGED:
            self.seen.append((event, arguments))

    @contextmanager
    def watching(self):
        self.looking = True
        try:
            yield
        finally:
            self.looking = False


@pytest.fixture(scope="session")
def witness():
    return Witness()


class WaitsForEver(BaseException):
    """Of a reader; nothing in the product may catch it."""


@contextmanager
def patience(seconds):
    def stop(*_):
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path):
    """Two runs of a matrix, which a and b are together, with all files that a run may leave."""
    matrix, runs = planned(
        tmp_path, factors={"spans": {"1": [], "3": ["stp.n_spans=3"]}}, seeds=[1], baseline={"spans": "1"}
    )
    folder = tmp_path / "runs"
    runs = tuple(dataclasses.replace(run, directory=folder / name) for run, name in zip(runs, "ab", strict=True))
    for run in runs:
        leave(run, iterations=14, complete=False)
    b = folder / "b"
    for name in FILES:
        path = b / name
        if not path.exists() and name != "invalid.json":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("12" if path.suffix == ".txt" else "{}")
    shutil.copy(b / "receipt.json", b / "attempt-1" / "receipt.json")
    return folder, matrix, runs


# What is done to a file


def bytes_of(chance, whole):
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(whole) + 1)
        piece = chance.choice([*PIECES, chance.randbytes(chance.randrange(9))])
        whole = whole[:start] + piece + whole[start + chance.choice([0, 0, 1, 9, 500, 2**20]) :]
    return whole


def values_of(chance, whole):
    """Some values of a document, or of a line of it, are others or gone; a plan's digest is made to fit."""
    lines = whole.splitlines() if b"\n{" in whole else [whole]
    at = chance.randrange(len(lines)) if lines else 0
    try:
        document = json.loads(lines[at])
    except (ValueError, IndexError):
        return bytes_of(chance, whole)
    for _ in range(chance.randint(1, 2)):
        paths = list(paths_of(document))
        if paths:
            value = chance.choice(
                [*VALUES, VALUES, chance.randint(-9, 9), chance.random() * 10 ** chance.randint(-9, 300)]
            )
            document = replaced(document, chance.choice(paths), value)
    if isinstance(document, dict) and "plan_format" in document and chance.random() < 0.8:
        document["digest"] = plan_digest({key: item for key, item in document.items() if key != "digest"})
    lines[at] = json.dumps(document).encode()
    return b"\n".join(lines) + b"\n"


def encoded(chance, whole):
    text = whole.decode("utf-8", "replace")
    return text.encode(chance.choice(["utf-16", "utf-32", "utf-8-sig", "cp037", "utf-7"]), "replace")


def older(chance, whole):
    """A receipt of another version, with a part of what it has."""
    try:
        document = json.loads(whole)
        names = chance.sample(sorted(document), chance.randrange(len(document)))
        return json.dumps(
            {**{name: document[name] for name in names}, "receipt_version": chance.choice([0, 1, 2, 3])}
        ).encode()
    except (ValueError, TypeError, AttributeError):
        return whole[: chance.randrange(len(whole) + 1)]


def put(chance, path, whole, others):
    """Something else in the place of a file of a run."""
    path.unlink(missing_ok=True)
    kind = chance.choices(
        ["bytes", "values", "cut", "encoded", "older", "foreign", "swapped", "pipe", "folder", "link", "none"],
        [4, 8, 2, 1, 2, 2, 2, 1, 1, 2, 1],
    )[0]
    path.parent.mkdir(exist_ok=True, parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        targets = [path, "/dev/null", "/dev/full", "/proc/self/mem", "/proc/version", path.parent, "../../../../none"]
        path.symlink_to(chance.choices(["/dev/zero", *targets], [1, *[8] * len(targets)])[0])
    elif kind != "none":
        simple = {
            "cut": lambda: whole[: chance.randrange(len(whole) + 1)],
            "foreign": lambda: chance.choice(FOREIGN),
            "swapped": lambda: chance.choice(others),
        }
        changed = {"bytes": bytes_of, "values": values_of, "encoded": encoded, "older": older}
        path.write_bytes(simple[kind]() if kind in simple else changed[kind](chance, whole))
    return kind


# What is asked


def asked(folder, matrix):
    """Commands as users give them."""
    a, b = str(folder / "a"), str(folder / "b")
    receipts = [f"{a}/receipt.json", f"{b}/receipt.json"]
    yield from (["runs", "show", str(folder)], ["runs", "show", b], ["runs", "show", b, "--format", "json"])
    yield from (["runs", "compare", a, b], ["runs", "compare", a, b, "--assert-equal"])
    yield ["runs", "compare", b, a, "--allow-unlike", "--metric", "stp_loss_by_tap.6", "--format", "json"]
    yield from (["runs", "watch", b, "--once"], ["runs", "watch", str(folder), "--once"])
    yield from (["diff", a, b], ["diff", *receipts], ["diff", b, "nam56r-tiny", "--format", "json"])
    yield ["ablate", str(matrix), "--run-dir", str(folder), "--device", "cpu", "--resume", "--dry-run"]
    yield from (
        ["launch", "--resume", "--run-dir", b, "--device", "cpu", "--dry-run", *more]
        for more in ([], ["--set", "training.iterations=50", "--allow-plan-change"])
    )


def answer(command):
    """The command in this process; a traceback of it is this test's."""
    try:
        with redirect_stdout(io.StringIO()):
            status = PROGRAM.main(args=list(command), prog_name="megacpp-stp", standalone_mode=False)
    except UserError as error:
        require_clear(error)
    else:
        assert status in (None, 0, 1)


def require_clear(error):
    """A user's mistake: what is wrong, where, and what to do. It can be printed."""
    assert error.problem
    assert error.field
    assert error.fix
    str(error).encode()


def attempt(question):
    try:
        return question()
    except UserError as error:
        require_clear(error)
        return None


def ask_all(folder, matrix, runs, *, file, drawn):
    for command in asked(folder, file):
        try:
            answer(command)
        except BaseException as error:
            error.add_note(f"asked: {' '.join(command)}")
            raise
    tasks = attempt(lambda: list_tasks(runs, directory=folder, resume=True))
    assert tasks is None or len(tasks) == 2
    verdict = attempt(lambda: judge_matrix(matrix, runs))
    json.dumps(as_dict(matrix, runs, verdict, directory=folder), allow_nan=False)
    if verdict is not None and drawn:
        matrix_page(matrix, complete_runs(runs)[0], verdict)
    Tail(folder / "b" / "none").look()
    for directories in ([folder / "b"], [folder / "a", folder / "b"]):
        report = attempt(lambda directories=directories: build_report(directories, allow_unlike=True))
        if report is not None and drawn:
            attempt(lambda report=report: page(report, plots_of(report)))


def snapshot(folder):
    return {path: os.lstat(path)[:7] + os.lstat(path)[8:] for path in folder.rglob("*")}  # all but when it was read


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("files", EFFORT)
def test_whatever_lies_there_is_read_or_refused(files, folder, witness, monkeypatch):
    folder, matrix, runs = folder
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(code, "code_hash", lambda: CODE["sha256"])  # so that a matrix of these runs may go on
    b, file = folder / "b", folder.parent / "matrix.yaml"
    whole = {name: (b / name).read_bytes() if (b / name).exists() else b"{}" for name in FILES}
    ask_all(folder, matrix, runs, file=file, drawn=files > DRAWN_EACH)  # what is imported only now may do as it likes
    number = 0
    while files > 0:
        number += 1
        chance = random.Random(number)
        kept = folder.parent / "kept"
        shutil.copytree(b, kept, symlinks=True)
        done = {}
        for name in chance.choices(
            FILES, [9, 9, 9, 2, 2, 2, *[1] * (len(FILES) - 6)], k=chance.choice([1, 1, 1, 2, 4])
        ):
            if not (b / name).is_dir():
                done[name] = put(chance, b / name, whole[name], list(whole.values()))
        before = snapshot(folder)
        try:
            with patience(LONGEST_S), witness.watching():
                ask_all(folder, matrix, runs, file=file, drawn=number % DRAWN_EACH == 0)
            assert witness.seen == []
            assert snapshot(folder) == before
            if attempt(lambda: invalidate(b, "made up")):
                (b / "invalid.json").unlink()
            assert snapshot(folder).keys() == before.keys()
        except BaseException as error:
            error.add_note(f"example {number}: {done}")
            raise
        finally:
            witness.seen.clear()
        files -= len(done)
        shutil.rmtree(b)
        kept.rename(b)


@pytest.mark.parametrize("name", ["../c", "a/../../c", "..", "/etc", "-rf", "a\nb", "\x1b[2J", "a" * 300, "b\udcff"])
def test_names_that_lead_elsewhere_are_only_names(folder, name, witness):
    """On the command line, in place of a run; and none of these is created."""
    folder, matrix, _ = folder
    before = snapshot(folder.parent)
    for command in asked(folder, folder.parent / "matrix.yaml"):
        changed = [word.replace(str(folder / "b"), f"{folder}/{name}") for word in command]
        with patience(LONGEST_S), suppress(OSError):  # such as "File name too long": the program's last word
            answer(changed)
    assert snapshot(folder.parent) == before
