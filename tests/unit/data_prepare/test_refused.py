"""What `data prepare` and the reader of its manifest refuse, and how they say it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megacpp_stp.cli.data import app
from megacpp_stp.data import corpus, tokenizer
from megacpp_stp.data.manifest import DatasetManifest, load_manifest
from megacpp_stp.data.prepare import MAX_WORKERS_PER_CPU, prepare
from megacpp_stp.errors import UserError
from tests.unit.data_prepare.corpora import VOCAB, contents, error_of, options, words

# megatron-core converts torch tensors in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"inputs": (Path("no-such-input"),)}, "INPUT"),
        ({"inputs": (Path(os.devnull),)}, "INPUT"),
        ({"suffixes": (".rs",)}, "INPUT"),
        ({"suffixes": ("h",)}, "--suffix"),
        ({"vocab_size": 257}, "--vocab-size"),
        ({"vocab_size": 60_000}, "--vocab-size"),
        ({"vocab_size": tokenizer.MAX_VOCAB_SIZE}, "--vocab-size"),
        ({"vocab_size": 999_999_999}, "--vocab-size"),
        ({"vocab_size": 10**20 - 1}, "--vocab-size"),
        ({"valid_fraction": 0.0}, "--valid-fraction"),
        ({"valid_fraction": 1.0}, "--valid-fraction"),
        ({"valid_fraction": math.nan}, "--valid-fraction"),
        ({"valid_fraction": 0.001}, "--valid-fraction"),
        ({"valid_fraction": 0.999}, "--valid-fraction"),
        ({"max_bytes": 1}, "--max-bytes"),
        ({"max_bytes": 0}, "--max-bytes"),
        ({"min_bytes": 0}, "--min-bytes"),
        ({"min_bytes": 10**9}, "INPUT"),
        ({"min_bytes": 2**63}, "--min-bytes"),
        ({"max_bytes": 2**63}, "--max-bytes"),
        ({"seed": 2**63}, "--seed"),
        ({"seed": -(2**63) - 1}, "--seed"),
        ({"workers": 0}, "--workers"),
        ({"workers": 100_000}, "--workers"),
        ({"output": Path("x" * 300)}, "--output"),
        ({"tokenizer": Path("no-such-tokenizer")}, "--tokenizer"),
    ],
)
def test_a_wrong_option_is_named(source: Path, tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    changes = {**changes, "output": tmp_path / changes.get("output", "set")}
    error = error_of(lambda: prepare(options(source, **changes)))
    assert error.field == field
    assert list(tmp_path.iterdir()) == []


def test_the_reachable_vocabulary_works(source: Path, tmp_path: Path) -> None:
    error = error_of(lambda: prepare(options(source, tmp_path / "set", vocab_size=60_000)))
    reachable = int(str(error.fix).split()[2])
    assert str(reachable) in error.problem
    made = prepare(options(source, tmp_path / "set", vocab_size=reachable))
    assert made.tokenizer.vocab_size == reachable


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--vocab-size", "999999999"),
        ("--vocab-size", "99999999999999999999"),
        ("--workers", "100000"),
        ("--seed", "-99999999999999999999"),
    ],
)
def test_no_number_stops_the_command_with_a_traceback(source: Path, tmp_path: Path, option: str, value: str) -> None:
    # A number that overruns the tokenizers library aborts the process, so the command needs one of its own.
    program = "import sys; from megacpp_stp.cli.app import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["data", "prepare", source, "-o", tmp_path / "set", option, value, "--suffix", ".h"]
    run = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert option in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_largest_numbers_are_taken(prepared: DatasetManifest, source: Path, tmp_path: Path) -> None:
    most = 2**63 - 1
    chosen = options(source, tmp_path / "set", tokenizer=prepared.tokenizer_dir, max_bytes=most, seed=-most - 1)
    made = prepare(dataclasses.replace(chosen, workers=MAX_WORKERS_PER_CPU * len(os.sched_getaffinity(0))))
    assert (made.options.max_bytes, made.options.seed) == (most, -most - 1)
    assert load_manifest(tmp_path / "set") == made


def test_an_output_that_is_a_link_is_refused(prepared: DatasetManifest, source: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared.directory, tmp_path / "set")
    for link, target in (("dangling", "absent"), ("good", "set"), ("chain", "good"), ("loop", "loop")):
        (tmp_path / link).symlink_to(target)
    before = contents(tmp_path)
    for name in ("dangling", "good", "chain", "loop", "dangling/below", "loop/below"):
        for force in (False, True):
            chosen = options(source, tmp_path / name, tokenizer=prepared.tokenizer_dir, force=force)
            error = error_of(lambda chosen=chosen: prepare(chosen))
            assert error.field == "--output" and "symbolic link" in error.problem
            assert ("does not exist" in error.problem) == ("dangling" in name or "loop" in name)
    assert contents(tmp_path) == before
    assert not (tmp_path / "absent").exists()


def test_an_output_below_a_linked_directory_is_made(prepared: DatasetManifest, source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    prepare(options(source, tmp_path / "data" / "set", tokenizer=prepared.tokenizer_dir))
    assert (tmp_path / "disk" / "set" / "dataset.json").is_file()


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # A panic in the library's Rust code, on loading and on encoding.
        ("panic", lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("panic", lambda raw: raw["model"].update(continuing_subword_prefix="long prefix")),
        # An exception on encoding.
        ("unknown", lambda raw: raw.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"})),
    ],
)
def test_a_tokenizer_the_library_fails_on_is_named(
    prepared: DatasetManifest, source: Path, tmp_path: Path, name: str, change: Callable[[Any], object]
) -> None:
    broken = tmp_path / "tokenizer"
    shutil.copytree(prepared.tokenizer_dir, broken)
    edit(broken / "tokenizer.json", change)
    chosen = options(source, tmp_path / "set", vocab_size=None, tokenizer=broken)
    assert error_of(lambda: prepare(chosen)).field == "--tokenizer"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_panic_of_the_trainer_is_an_error_of_the_user(tmp_path: Path) -> None:
    # The options are checked long before; this is the panic nobody foresaw.
    def train() -> None:
        tokenizer.train_tokenizer(["some text " * 9], vocab_size=2**64 - 1, directory=tmp_path / "tokenizer")

    assert error_of(train).field == "--vocab-size"


def test_a_signal_passes_through_the_trainer(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "some text "
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenizer.train_tokenizer(texts(), vocab_size=300, directory=tmp_path / "tokenizer")


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
