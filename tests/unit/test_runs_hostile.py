"""Whatever lies in a run directory ends in an answer or in our own error, and nothing there is changed."""

import copy
import io
import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from megacpp_stp.cli.runs_tables import print_comparison, print_equality, print_folder
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.runs.compare import compare_runs
from megacpp_stp.runs.equality import check_equal
from megacpp_stp.runs.folder import list_folder
from megacpp_stp.runs.summary import print_summary, summarise
from tests.unit.made_runs import make_run

EFFORT = [pytest.param(100, id="quick"), pytest.param(5_000, id="thorough", marks=pytest.mark.slow)]
ITERATIONS = 14
VALUES = [
    *(None, True, "", "x", "\x1b[2J", "\ud800", "[red]", "a" * 5000, "../../x"),
    *(-1, 0, 1, 7, 2**53, 2**64, 10**400, -0.0, 0.5, 1e-320, 1e308, -1e308),
    *([], [[]], [1], [None], {}, {"x": {}}, {"stp": None}, {"6": [1]}, {"": ""}),
]
PIECES = [
    *(b"", b"\n", b"\n\n", b"{", b"}", b"[", b"{}\n", b"[]", b"NaN", b"-Infinity", b"1e999", b"null", b'"', b"\\u0000"),
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"\r",
        b"\xe2\x80\xa8",
    ),
]


def answers(folder):
    """Ask everything of a folder with the runs a and b."""
    a, b = folder / "a", folder / "b"
    out = Console(file=io.StringIO(), width=160)

    def ask(question, show):
        try:
            found = question()
        except UserError as error:
            assert str(error)
            assert error.field
            assert error.fix
            return
        json.dumps(found if isinstance(found, dict) else [one.as_dict() for one in found], allow_nan=False)
        show(found)

    ask(lambda: list_folder(folder), lambda found: print_folder(found, out))
    ask(lambda: summarise(b), lambda found: print_summary(b, out))
    for metric in ("lm_loss", "stp_loss_by_tap.6"):
        ask(
            lambda metric=metric: [compare_runs([a, b], metric=metric, allow_unlike=True)],
            lambda found: print_comparison(found[0], out),
        )
    ask(lambda: check_equal([a, b]), lambda found: print_equality(found, out))


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs"
    for name in "ab":
        make_run(folder / name, "stp.start_step=1", iterations=ITERATIONS, complete=False)
    os.makedirs(folder / "b" / "attempt-1")
    (folder / "b" / "attempt-1" / "receipt.json").write_bytes((folder / "b" / "receipt.json").read_bytes())
    return folder


def fuzz(strategy, property_, examples):
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, suppress_health_check=health, database=None)(
        given(strategy)(property_)
    )()


FILES = st.sampled_from(["receipt.json", "metrics.jsonl", "plan.json", "attempt-1/receipt.json", "invalid.json"])
places = st.integers(0, 2**20)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", EFFORT)
def test_bytes_that_were_put_in_or_cut_out(examples, folder):
    run = folder / "b"
    whole = snapshot(run)
    pieces = st.sampled_from(PIECES) | st.binary(max_size=8)

    def property_(chosen):
        name, edits = chosen
        path = run / name
        content = whole.get(path, b"{}")
        for start, length, piece in edits:
            start %= len(content) + 1
            content = content[:start] + piece + content[start + length :]
        path.write_bytes(content)
        before = snapshot(folder)
        answers(folder)
        assert snapshot(folder) == before
        path.unlink()
        if path in whole:
            path.write_bytes(whole[path])

    edits = st.tuples(places, st.sampled_from([0, 0, 1, 9, 500, 2**20]), pieces)
    fuzz(st.tuples(FILES, st.lists(edits, min_size=1, max_size=3)), property_, examples)


def paths_of(node, path=()):
    if path:
        yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from paths_of(node[key], (*path, key))


def replaced(document, path, value):
    node = document = copy.deepcopy(document)
    for key in path[:-1]:
        node = node[key]
    if value is VALUES:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return document


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", EFFORT)
def test_values_that_no_run_writes(examples, folder):
    """One value of one file is another, or is gone; the plan's digest is made to fit."""
    run = folder / "b"
    whole = snapshot(run)
    texts = {name: (run / name).read_text() for name in ("receipt.json", "plan.json", "metrics.jsonl")}
    records = list(map(json.loads, texts["metrics.jsonl"].splitlines()))
    documents = {name: json.loads(texts[name]) for name in ("receipt.json", "plan.json")}
    documents["metrics.jsonl"] = records
    paths = [(name, path) for name, document in documents.items() for path in paths_of(document)]

    def property_(chosen):
        (name, path), value = chosen
        document = replaced(documents[name], path, value)
        if name == "plan.json" and isinstance(document, dict):
            document["digest"] = plan_digest({key: each for key, each in document.items() if key != "digest"})
            receipt = {**documents["receipt.json"], "plan_digest": document["digest"]}
            (run / "receipt.json").write_text(json.dumps(receipt))
        lines = document if name == "metrics.jsonl" else [document]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        before = snapshot(folder)
        answers(folder)
        assert snapshot(folder) == before
        for file, content in whole.items():
            file.write_bytes(content)

    values = st.sampled_from(VALUES) | st.just(VALUES) | st.integers() | st.floats(allow_nan=True) | st.text(max_size=9)
    fuzz(st.tuples(st.sampled_from(paths), values), property_, examples)


@pytest.mark.parametrize(
    "name", ["receipt.json", "metrics.jsonl", "plan.json", "attempt-1/receipt.json", "invalid.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "nowhere", "huge", "lines"])
def test_files_that_are_none(folder, name, kind):
    """A reader neither waits for ever nor reads without end."""
    path = folder / "b" / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as handle:
            handle.truncate(2**40)  # sparse: takes no room
    elif kind == "lines":
        path.write_bytes(b"\n" * 2**20)
    else:
        path.symlink_to({"loop": path, "device": "/dev/zero", "nowhere": folder / "none"}[kind])
    began = time.process_time()
    answers(folder)
    assert time.process_time() - began < 20  # not a speed: reading on would take hours


def test_a_folder_of_links(folder):
    """To a run, to itself, to nowhere, to the folder above."""
    (folder / "link").symlink_to(folder / "a")
    (folder / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone").symlink_to(folder / "none")
    found = list_folder(folder)
    assert [run["name"] for run in found["runs"]] == ["a", "b", "link"]
    with pytest.raises(UserError, match="is named twice"):
        compare_runs([folder / "a", folder / "link"])
