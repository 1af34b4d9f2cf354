"""`megacpp-stp data prepare` with the real tokenizers and megatron-core libraries."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megacpp_stp.cli.data import app
from megacpp_stp.data import corpus, directory, indexed, selection, tokenizer
from megacpp_stp.data.manifest import DatasetManifest, load_manifest
from megacpp_stp.data.prepare import PrepareOptions, prepare
from megacpp_stp.errors import UserError

pytest.importorskip("tokenizers")
pytest.importorskip("megatron.core")

# megatron-core converts torch tensors in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VOCAB = 300
ODD_TEXTS = (
    "ends with no newline",
    "\ufeffbyte order mark\r\nand CRLF\r\n",
    "NUL \x00 and DEL \x7f and  trailing spaces   \n\n\n",
    "emoji 🧪, кириллица, 漢字, combining e\u0301\n",
    "literal <|endoftext|> and <|pad|> inside\n",
    "\t\tint main() { return don't + we'll; }\n",
)


def words(count: int, *, seed: int) -> str:
    rng = random.Random(seed)
    stock = ["template", "class", "int", "float", "return", "const", "void", "{", "}", ";", "\n    ", "x"]
    return " ".join(rng.choices(stock, k=count)) + f" // {seed}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "source"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.h").write_text("hidden\n")
    for number in range(40):
        (root / "sub" / f"{number:02}.h").write_text(words(200, seed=number))
    for number, text in enumerate(ODD_TEXTS):
        (root / "sub" / "deep" / f"odd{number}.hpp").write_bytes(text.encode())
    (root / "copy_of_0.h").write_bytes((root / "sub" / "00.h").read_bytes())
    (root / "empty.h").write_bytes(b"")
    (root / "notes.txt").write_text("not wanted\n")
    (root / "link.h").symlink_to(root / "sub" / "01.h")
    return root


def options(source: Path, output: Path, **changes: Any) -> PrepareOptions:
    values: dict[str, Any] = {
        "inputs": (source,),
        "output": output,
        "vocab_size": VOCAB,
        "suffixes": (".h", ".hpp"),
        "valid_fraction": 0.2,
    }
    return PrepareOptions(**{**values, **changes})


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    return prepare(options(source, tmp_path_factory.mktemp("out") / "set", workers=1))


def read_split(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def error_of(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.fix
    return caught.value


# What is written


def test_the_tokens_decode_to_the_documents(source: Path, prepared: DatasetManifest) -> None:
    loaded = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    expected = {path.read_bytes().decode() for path in (source / "sub").rglob("*.h*")}
    splits: dict[str, list[str]] = {}
    for name, prefix in (("train", prepared.train_prefix), ("valid", prepared.valid_prefix)):
        documents = read_split(prefix)
        for ids in documents:
            assert ids[-1] == loaded.eod_id
            assert loaded.eod_id not in ids[:-1]
        splits[name] = [loaded.decode(ids[:-1]) for ids in documents]
        info = getattr(prepared.splits, name)
        assert info.documents == len(documents)
        assert info.tokens == sum(map(len, documents))
        assert info.bytes == sum(len(text.encode()) for text in splits[name])
    assert len(splits["valid"]) == round(0.2 * len(expected))
    assert not set(splits["train"]) & set(splits["valid"])
    assert len(splits["train"]) + len(splits["valid"]) == len(expected)
    assert set(splits["train"]) | set(splits["valid"]) == expected


def test_the_manifest_counts_what_was_left_out(source: Path, prepared: DatasetManifest) -> None:
    assert prepared.duplicates_dropped == 1
    assert prepared.skipped == {"hidden": 1, "symlink": 1, "other_suffix": 1, "empty": 1}
    assert prepared.source.roots == ("source",)
    assert prepared.source.files == 40 + len(ODD_TEXTS) + 2
    text = (prepared.directory / "dataset.json").read_text()
    assert str(source.parent) not in text and str(prepared.directory.parent) not in text


def test_megatron_and_transformers_load_the_tokenizer(prepared: DatasetManifest) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from transformers import AutoTokenizer

    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(prepared.tokenizer_dir),
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        trust_remote_code=False,
        tokenizer_hf_no_include_special_tokens=False,
        metadata_path=None,
        pad_vocab_size=False,
    )
    megatron = build_tokenizer(args)
    hugging_face = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    ours = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    assert megatron.vocab_size == len(hugging_face) == ours.vocab_size == VOCAB
    assert megatron.eod == hugging_face.eos_token_id == ours.eod_id == prepared.tokenizer.eod_id
    assert hugging_face.pad_token_id == ours.backend.token_to_id(tokenizer.PAD)
    for text in ODD_TEXTS:
        if "<|" in text:
            continue
        ids = ours.encode([text])[0]
        assert megatron.tokenize(text) == hugging_face(text).input_ids == ids
        assert megatron.detokenize(ids) == hugging_face.decode(ids) == text


def test_every_byte_and_the_text_of_a_special_token_round_trip(prepared: DatasetManifest) -> None:
    ours = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    everything = "".join(map(chr, [*range(0x900), *range(0xFFF0, 0x10000), 0x1F9EA, 0x10FFFF]))
    for text in (everything, tokenizer.END_OF_TEXT, f" {tokenizer.PAD}{tokenizer.END_OF_TEXT}x"):
        ids = ours.encode([text])[0]
        assert not {ours.eod_id, ours.backend.token_to_id(tokenizer.PAD)} & set(ids)
        assert ours.decode(ids) == text


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (70_000, "int32")])
def test_the_token_type_follows_the_vocabulary(
    prepared: DatasetManifest, source: Path, tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    loaded = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    path = source / "sub" / "00.h"
    found = corpus.scan([path], min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    wide = tokenizer.TextTokenizer(loaded.backend, vocab_size=vocab_size, eod_id=loaded.eod_id)
    indexed.write_split(found.documents, prefix=tmp_path / "x", tokenizer=wide, workers=1, advance=lambda done: None)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset.index.dtype.__name__ == dtype
    assert loaded.decode(dataset[0].tolist()[:-1]) == path.read_text()


# What it depends on


def test_the_result_depends_on_contents_and_options_only(
    source: Path, prepared: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "source"
    shutil.copytree(source, moved, symlinks=True)
    (moved / "sub" / "07.h").rename(moved / "aaa.h")
    monkeypatch.setattr(indexed, "_CHUNK_BYTES", 2_000)
    again = prepare(options(moved, tmp_path / "again", workers=3))
    assert contents(again.directory) == contents(prepared.directory)
    other = prepare(options(moved, tmp_path / "other", seed=7, tokenizer=prepared.tokenizer_dir))
    assert other.splits.train.bin_sha256 != prepared.splits.train.bin_sha256


def test_max_bytes_takes_a_prefix_of_the_order(source: Path) -> None:
    files = corpus.find_files([source], suffixes=[".h"]).files
    found = corpus.scan(files, min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    order = selection.shuffle(found.documents, seed=1)
    assert order == selection.shuffle(found.documents[::-1], seed=1)
    assert order != selection.shuffle(found.documents, seed=2)
    limit = sum(document.size for document in order[:10])
    assert selection.take_bytes(order, max_bytes=limit) == order[:10]
    assert selection.take_bytes(order, max_bytes=limit - 1) == order[:9]
    assert selection.take_bytes(order, max_bytes=None) == order


def test_jsonl_holds_a_document_per_line(prepared: DatasetManifest, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ODD_TEXTS]
    raw = "\n".join([*lines, "", json.dumps({"text": ""}), json.dumps({"text": "tiny"}), lines[0]])
    (tmp_path / "in.jsonl").write_text(raw)
    manifest = prepare(
        options(
            tmp_path / "in.jsonl",
            tmp_path / "set",
            vocab_size=None,
            valid_fraction=0.5,
            min_bytes=5,
            tokenizer=prepared.tokenizer_dir,
        )
    )
    loaded = tokenizer.load_tokenizer(manifest.tokenizer_dir)
    texts = [
        loaded.decode(ids[:-1])
        for prefix in (manifest.train_prefix, manifest.valid_prefix)
        for ids in read_split(prefix)
    ]
    assert sorted(texts) == sorted(ODD_TEXTS)
    assert manifest.duplicates_dropped == 1
    assert manifest.skipped == {"empty": 2, "shorter_than_min_bytes": 1}
    assert manifest.tokenizer.origin == "reused"
    assert manifest.tokenizer.sha256 == prepared.tokenizer.sha256


def test_undecodable_documents_are_left_out_on_request(prepared: DatasetManifest, source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latin1.h").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "lone.jsonl").write_text('{"text": "\\ud800"}')
    bad = (source, tmp_path / "in")
    changes: dict[str, Any] = {"inputs": bad, "suffixes": (), "tokenizer": prepared.tokenizer_dir}
    error = error_of(lambda: prepare(options(source, tmp_path / "set", **changes)))
    assert "UTF-8" in error.problem and str(error.field).endswith("latin1.h")
    assert "--skip-undecodable" in str(error.fix)
    manifest = prepare(options(source, tmp_path / "set", **changes, skip_undecodable=True))
    assert manifest.skipped["not_utf8"] == 2


def test_the_tokenizer_learns_from_training_documents_only(tmp_path: Path) -> None:
    found = tmp_path / "in"
    found.mkdir()
    for number in range(20):
        (found / f"{number}.txt").write_text(f"{chr(0x4E00 + number) * 4} " * 50)
    made = prepare(options(found, tmp_path / "set", suffixes=(), vocab_size=260, valid_fraction=0.05))
    valid = tokenizer.load_tokenizer(made.tokenizer_dir)
    (held_out,) = read_split(made.valid_prefix)
    char = valid.decode(held_out[:-1])[0]
    merged = json.loads((made.tokenizer_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merged) == 2
    assert len(valid.encode([char])[0]) > 1


# Atomicity


class Stop(BaseException):
    pass


@contextmanager
def stopped_at(stage: str, *, by: Callable[[], None]) -> Iterator[Any]:
    class Reporter:
        @contextmanager
        def stage(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
            if name == stage:
                by()
            yield lambda done: None

    yield Reporter()


def raise_stop() -> None:
    raise Stop


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_run_leaves_nothing(source: Path, prepared: DatasetManifest, tmp_path: Path) -> None:
    chosen = options(source, tmp_path / "set", tokenizer=prepared.tokenizer_dir)
    with stopped_at("encoding valid", by=raise_stop) as reporter, pytest.raises(Stop):
        prepare(chosen, reporter)
    assert list(tmp_path.iterdir()) == []
    with stopped_at("encoding valid", by=disk_full) as reporter:
        error = error_of(lambda: prepare(chosen, reporter))
    assert "No space left" in error.problem
    assert list(tmp_path.iterdir()) == []


def test_force_keeps_the_old_dataset_until_the_new_one_is_complete(
    source: Path, prepared: DatasetManifest, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    shutil.copytree(prepared.directory, output)
    (output / "train" / "cache").mkdir(parents=True)
    (output / "train" / "cache" / "index.npy").write_bytes(b"made by megatron")
    before = contents(output)
    chosen = options(source, output, seed=7, tokenizer=prepared.tokenizer_dir)
    assert "--force" in str(error_of(lambda: prepare(chosen)).fix)
    forced = options(source, output, seed=7, tokenizer=prepared.tokenizer_dir, force=True)
    with stopped_at("encoding valid", by=raise_stop) as reporter, pytest.raises(Stop):
        prepare(forced, reporter)
    assert contents(output) == before
    prepare(forced)
    assert load_manifest(output).options.seed == 7
    assert not (output / "train").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_swap_keeps_the_old_dataset(
    prepared: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    output = tmp_path / "set"
    shutil.copytree(prepared.directory, output)
    rename, calls = os.rename, 0

    def failing_rename(old: Path, new: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing_rename)

    def replace() -> None:
        with directory.new_directory(output, replace=True) as partial:
            (partial / "dataset.json").write_text("new")

    error_of(replace)
    assert contents(output) == contents(prepared.directory)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_dataset_set_aside_by_a_killed_run_is_put_back(prepared: DatasetManifest, tmp_path: Path) -> None:
    output = tmp_path / "set"
    shutil.copytree(prepared.directory, tmp_path / f".set.old-{dead_pid()}")
    with (
        pytest.raises(UserError, match="already exists"),
        directory.new_directory(output, replace=False),
    ):
        pass
    assert contents(output) == contents(prepared.directory)


def test_partial_directories_are_removed_when_abandoned_only(tmp_path: Path) -> None:
    abandoned = tmp_path / f".set.partial-{dead_pid()}"
    running = tmp_path / f".set.partial-{os.getppid()}"
    locked = tmp_path / f".set.partial-{dead_pid()}"
    other = tmp_path / ".set.partial-notes"
    for path in (abandoned, running, locked, other):
        path.mkdir()
    lock = directory._lock(locked)
    assert lock is not None
    with directory.new_directory(tmp_path / "set", replace=False) as partial:
        (partial / "file").write_text("x")
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == sorted([running, locked, other, tmp_path / "set"])


@pytest.mark.parametrize("content", [None, "{}", '{"format_version": 1, "files": {}}'])
def test_force_spares_what_it_did_not_make(
    source: Path, prepared: DatasetManifest, tmp_path: Path, content: str | None
) -> None:
    output = tmp_path / "set"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    if content is not None:
        (output / "dataset.json").write_text(content)
    before = contents(output)
    forced = options(source, output, tokenizer=prepared.tokenizer_dir, force=True)
    assert error_of(lambda: prepare(forced)).field == "--output"
    assert contents(output) == before


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from megacpp_stp.cli.data import app; app()", *map(str, arguments)]


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, f"the run ended before {pattern} appeared"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("signal_number", "status", "remains"),
    [(signal.SIGKILL, -signal.SIGKILL, 1), (signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0)],
)
def test_a_killed_run_leaves_no_dataset(
    prepared: DatasetManifest,
    source: Path,
    tmp_path: Path,
    signal_number: signal.Signals,
    status: int,
    remains: int,
) -> None:
    big = tmp_path / "big"
    big.mkdir()
    for number in range(200):
        (big / f"{number}.txt").write_text(words(10_000, seed=number))
    parent = tmp_path / "out"
    parent.mkdir()
    run = command("prepare", big, "-o", parent / "set", "--tokenizer", prepared.tokenizer_dir, "--workers", 1)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(parent, ".set.partial-*/train.bin", process)
    process.send_signal(signal_number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not (parent / "set").exists()
    assert len(list(parent.iterdir())) == remains
    if signal_number != signal.SIGKILL:
        assert stderr.splitlines()[-1].startswith(f"stopped by {signal_number.name}")
    error_of(lambda: load_manifest(parent / "set"))
    prepare(options(source, parent / "set", tokenizer=prepared.tokenizer_dir))
    assert [path.name for path in parent.iterdir()] == ["set"]


# Errors


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"inputs": (Path("no-such-input"),)}, "INPUT"),
        ({"inputs": (Path(os.devnull),)}, "INPUT"),
        ({"suffixes": (".rs",)}, "INPUT"),
        ({"suffixes": ("h",)}, "--suffix"),
        ({"vocab_size": 257}, "--vocab-size"),
        ({"vocab_size": 60_000}, "--vocab-size"),
        ({"valid_fraction": 0.0}, "--valid-fraction"),
        ({"valid_fraction": 1.0}, "--valid-fraction"),
        ({"valid_fraction": math.nan}, "--valid-fraction"),
        ({"valid_fraction": 0.001}, "--valid-fraction"),
        ({"valid_fraction": 0.999}, "--valid-fraction"),
        ({"max_bytes": 1}, "--max-bytes"),
        ({"max_bytes": 0}, "--max-bytes"),
        ({"min_bytes": 0}, "--min-bytes"),
        ({"min_bytes": 10**9}, "INPUT"),
        ({"workers": 0}, "--workers"),
        ({"tokenizer": Path("no-such-tokenizer")}, "--tokenizer"),
    ],
)
def test_a_wrong_option_is_named(source: Path, tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    error = error_of(lambda: prepare(options(source, tmp_path / "set", **changes)))
    assert error.field == field
    assert list(tmp_path.iterdir()) == []


def test_the_reachable_vocabulary_works(source: Path, tmp_path: Path) -> None:
    error = error_of(lambda: prepare(options(source, tmp_path / "set", vocab_size=60_000)))
    reachable = int(str(error.fix).split()[2])
    assert str(reachable) in error.problem
    made = prepare(options(source, tmp_path / "set", vocab_size=reachable))
    assert made.tokenizer.vocab_size == reachable


@pytest.mark.parametrize("inside", ["new", "sub/deep/new", ".", "..", "loop"])
def test_input_and_output_may_not_contain_each_other(source: Path, tmp_path: Path, inside: str) -> None:
    copy = tmp_path / "parent" / "source"
    shutil.copytree(source, copy, symlinks=True)
    (copy / "loop").symlink_to("loop")
    before = contents(tmp_path)
    error = error_of(lambda: prepare(options(copy, copy / inside, force=True)))
    assert error.field == "--output"
    assert contents(tmp_path) == before


def test_an_unreadable_file_or_directory_is_named(source: Path) -> None:
    # pytest's directories admit nobody but root, and root may read anything.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "files").mkdir()
        (root / "files" / "secret.txt").write_text("x")
        (root / "files" / "secret.txt").chmod(0)
        (root / "closed").mkdir(mode=0)
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)
        try:
            listed = error_of(lambda: corpus.find_files([root / "closed"], suffixes=()))
            files = corpus.find_files([root / "files"], suffixes=()).files
            read = error_of(lambda: corpus.scan(files, min_bytes=1, skip_undecodable=True, advance=lambda done: None))
        finally:
            if as_root:
                os.seteuid(0)
    assert "Permission denied" in listed.problem and str(listed.field).endswith("closed")
    assert "Permission denied" in read.problem and str(read.field).endswith("secret.txt")


@pytest.mark.parametrize(
    "line", ["{", "[" * 100_000, '"text"', '{"body": "x"}', '{"text": 1}', '{"text": ' + "9" * 5000 + "}"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    error = error_of(lambda: corpus.scan([path], min_bytes=1, skip_undecodable=True, advance=lambda done: None))
    assert str(error.field).endswith("in.jsonl:2")


def test_a_file_that_changes_or_vanishes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "before"}\n')
    found = corpus.scan([path], min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    for after in ('{"text": "after!"}\n', "no longer JSON at all", '{"te'):
        path.write_text(after)
        assert "changed" in error_of(lambda: corpus.read_document(found.documents[0])).problem
    path.unlink()
    assert "No such file" in error_of(lambda: corpus.read_document(found.documents[0])).problem


def test_a_document_too_long_for_the_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_DOCUMENT_BYTES", 3)
    (tmp_path / "long.txt").write_text("four")
    error = error_of(
        lambda: corpus.scan([tmp_path / "long.txt"], min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    )
    assert str(error.field).endswith("long.txt")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda value: value.pop("model")),
        ("tokenizer_config.json", lambda value: value.pop("eos_token")),
        ("tokenizer_config.json", lambda value: value.update(eos_token="absent")),
        ("tokenizer.json", lambda value: value.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", lambda value: value["model"]["vocab"].update(Ā=5000)),
    ],
)
def test_an_unfit_tokenizer_is_not_reused(
    prepared: DatasetManifest, tmp_path: Path, name: str, change: Callable[[Any], object]
) -> None:
    broken = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_dir, broken)
    edit(broken / name, change)
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.h").write_text(f"Upper {number}")
    chosen = options(tmp_path / "in", tmp_path / "set", valid_fraction=0.5, vocab_size=None, tokenizer=broken)
    assert error_of(lambda: prepare(chosen)).field == "--tokenizer"


def test_a_reused_tokenizer_never_cuts_documents(prepared: DatasetManifest, tmp_path: Path) -> None:
    short = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_dir, short)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(short / "tokenizer.json", lambda value: value.update(truncation=cut))
    text = words(50, seed=1)
    loaded = tokenizer.load_tokenizer(short)
    assert loaded.decode(loaded.encode([text])[0]) == text


def test_reuse_of_a_dataset_points_to_its_tokenizer(source: Path, prepared: DatasetManifest, tmp_path: Path) -> None:
    error = error_of(lambda: prepare(options(source, tmp_path / "set", tokenizer=prepared.directory)))
    assert str(error.fix).endswith(str(prepared.tokenizer_dir))
    clash = options(source, tmp_path / "set", tokenizer=prepared.tokenizer_dir, vocab_size=VOCAB + 1)
    assert error_of(lambda: prepare(clash)).field == "--vocab-size"


@pytest.mark.parametrize("module", ["torch", "tokenizers", "megatron.core.datasets"])
def test_a_missing_library_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    error = error_of(lambda: prepare(options(source, tmp_path / "set")))
    assert "megacpp-stp[train]" in str(error.fix)
    assert list(tmp_path.iterdir()) == []


# The manifest


def test_the_manifest_reads_back(prepared: DatasetManifest) -> None:
    loaded = load_manifest(prepared.directory)
    assert loaded == prepared
    info = loaded.splits.valid
    assert loaded.bytes_per_token("valid") == info.bytes / info.tokens
    # A uniform guess over two tokens costs one bit per token.
    assert math.isclose(loaded.bits_per_byte("valid", loss_nats=math.log(2)), info.tokens / info.bytes)
    assert loaded.train_prefix.with_suffix(".bin").is_file()
    assert (loaded.tokenizer_dir / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda root: shutil.rmtree(root), "does not exist"),
        (lambda root: (root / "dataset.json").unlink(), "not a prepared dataset"),
        (lambda root: (root / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "dataset.json").write_text("[]"), "format_version"),
        (
            lambda root: edit(root / "dataset.json", lambda raw: raw.update(format_version=2)),
            "format_version",
        ),
        (lambda root: edit(root / "dataset.json", lambda raw: raw["splits"].pop("train")), "splits.train"),
        (lambda root: edit(root / "dataset.json", lambda raw: raw["files"].pop("valid.idx")), "valid.idx"),
        (lambda root: (root / "valid.bin").unlink(), "lacks its file valid.bin"),
        (lambda root: (root / "train.idx").write_bytes(b""), "file train.idx"),
    ],
)
def test_a_damaged_dataset_is_refused(
    prepared: DatasetManifest, tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    copy = tmp_path / "set"
    shutil.copytree(prepared.directory, copy)
    damage(copy)
    error = error_of(lambda: load_manifest(copy, field="data.path"))
    assert problem in error.problem
    assert error.field == "data.path"
    assert error_of(lambda: load_manifest(copy)).field


# The command


def test_the_command_prints_a_summary_and_keeps_progress_off_stdout(source: Path, tmp_path: Path) -> None:
    arguments = ["prepare", str(source), "--output", str(tmp_path / "set"), "--vocab-size", str(VOCAB)]
    extra = ["--suffix", ".h", "--suffix", ".hpp", "--valid-fraction", "0.2", "--max-bytes", "20000"]
    result = CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False)
    assert result.exit_code == 0
    made = load_manifest(tmp_path / "set")
    assert made.splits.train.bytes + made.splits.valid.bytes <= 20_000
    assert made.skipped["beyond_max_bytes"] > 0
    assert str(made.splits.train.tokens) in result.stdout
    assert str(tmp_path / "set") in result.stdout
    assert "reading: 100%" in result.stderr
    assert "reading" not in result.stdout


def test_the_command_leaves_user_errors_to_its_caller(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "no"), "-o", str(tmp_path / "set")])
    assert isinstance(result.exception, UserError)
    assert result.stdout == ""


def test_importing_the_command_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'tokenizers', 'megatron', 'transformers', 'numpy'}"
    code = f"import sys, megacpp_stp.cli.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
