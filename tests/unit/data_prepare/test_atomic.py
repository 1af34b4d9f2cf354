"""A run of `data prepare` that fails, is killed or replaces a dataset never leaves half of one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megacpp_stp.data import directory
from megacpp_stp.data.manifest import DatasetManifest, load_manifest
from megacpp_stp.data.prepare import prepare
from megacpp_stp.errors import UserError
from tests.unit.data_prepare.corpora import contents, error_of, options, words

# megatron-core converts torch tensors in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
