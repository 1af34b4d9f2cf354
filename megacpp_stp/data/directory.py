"""A dataset directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacpp_stp.data.corpus import display, real_path
from megacpp_stp.data.manifest import MANIFEST_NAME, read_raw_manifest
from megacpp_stp.errors import UserError


def resolve_output(output: Path) -> Path:
    """Return the real path of a directory to make.

    Args:
        output: The directory as the user named it.

    Raises:
        UserError: It is a symbolic link, or lies behind one that leads nowhere. The dataset would be made, or
            with `--force` replaced, in a place the user did not name.
    """
    for path in (output, *output.parents):
        if not os.path.islink(path) or (path != output and os.path.exists(path)):
            continue
        target = display(real_path(path))
        raise UserError(
            f"{display(path)} is a symbolic link to {target}"
            + ("" if os.path.exists(path) else ", which does not exist"),
            field="--output",
            value=display(output),
            fix="remove the link, or name the directory itself",
        )
    return real_path(output)


def check_target(output: Path, *, replace: bool) -> None:
    """Check that a dataset may be put at `output`.

    Args:
        output: The directory to make.
        replace: Whether a prepared dataset that lies there may be replaced.

    Raises:
        UserError: Something lies there, and it may not be replaced: `replace` is false, it is no prepared
            dataset, or it holds files of other origin.
    """
    if not os.path.lexists(output):
        return
    name = display(output)
    if not replace:
        raise UserError(
            "the output already exists",
            field="--output",
            value=name,
            fix="name another directory, or pass --force to replace a prepared dataset",
        )
    move = "move it away by hand, or name another directory"
    try:
        listed = read_raw_manifest(output).get("files")
    except UserError as error:
        raise UserError(
            f"--force only replaces a prepared dataset: {error.problem}",
            field="--output",
            value=name,
            fix=move,
        ) from error
    known = {MANIFEST_NAME, *listed} if isinstance(listed, dict) else {MANIFEST_NAME}
    for path in _files_below(output):
        relative = path.relative_to(output)
        if relative.as_posix() not in known and not _is_index_cache(relative):
            raise UserError(
                f"--force would delete a file that is not part of the dataset: {display(relative)}",
                field="--output",
                value=name,
                fix=move,
            )


@contextmanager
def new_directory(output: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary directory next to `output` that takes its name when the block ends well.

    The block's files reach the disk before the rename. When the block fails the temporary directory is
    removed; when the process is killed it stays, under a name no reader takes, until a later call for the
    same output removes it.

    Args:
        output: The directory to make; a resolved path.
        replace: Whether a prepared dataset that lies there may be replaced; see `check_target`.

    Raises:
        UserError: `output` may not be made or replaced, or a file cannot be written.
    """
    check_target(output, replace=replace)
    partial = _sibling(output, "partial")
    made, lock = False, None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        check_target(output, replace=replace)  # a leftover may have been put back
        partial.mkdir()
        made = True
        lock = _lock(partial)
        yield partial
        _sync(partial)
        check_target(output, replace=replace)
        _publish(partial, output)
    except OSError as error:
        raise UserError(
            f"the dataset cannot be written: {error.strerror or error}",
            field="--output",
            value=display(output),
            fix="free space on the disk, mend the permissions, or name another directory",
        ) from error
    finally:
        if made:
            shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(output):
            shutil.rmtree(_sibling(output, "old"), ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _publish(partial: Path, output: Path) -> None:
    old = _sibling(output, "old")
    try:
        if os.path.lexists(output):
            os.rename(output, old)
        os.rename(partial, output)
    except BaseException:
        if old.exists() and not os.path.lexists(output):
            os.rename(old, output)
        raise
    _sync_path(output.parent)


def _remove_leftovers(output: Path) -> None:
    """Remove what killed runs left; put the old dataset back where one was killed between its two renames."""
    for old in output.parent.glob(f".{glob.escape(output.name)}.old-*"):
        if _owner_runs(old):
            continue
        if os.path.lexists(output):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, output)
    for partial in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        if _owner_runs(partial):
            continue
        lock = _lock(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}")


def _owner_runs(path: Path) -> bool:
    pid = path.name.rpartition("-")[2]
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return int(pid) != os.getpid()


def _lock(directory: Path) -> int | None:
    """Lock a directory until the returned descriptor is closed; None where another process holds it.

    Process ids say nothing about runs in other containers or on other hosts; this does where the file
    system can lock, and where it cannot no leftover is removed.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_index_cache(relative: Path) -> bool:
    """Whether a file is a sample index that Megatron's GPTDataset caches below the prefix of a split."""
    return relative.parts[:2] in {("train", "cache"), ("valid", "cache")}


def _files_below(directory: Path) -> Iterator[Path]:
    for parent, directories, names in os.walk(directory):
        for name in names:
            yield Path(parent, name)
        for name in directories:
            if Path(parent, name).is_symlink():
                yield Path(parent, name)


def _sync(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            _sync_path(Path(parent, name))
        _sync_path(Path(parent))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
