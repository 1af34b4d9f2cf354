"""Who works in a run directory: one launcher at a time, and nobody else's ranks."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megacpp_stp.errors import UserError

# Two files, so that a launcher holds its own while its ranks hold theirs. They stay: a lock is on an open file, and a
# file that was removed could be locked twice.
LAUNCHER_LOCK, RANKS_LOCK = ".launcher.lock", ".ranks.lock"
# Whoever only looks whether a lock is free holds it for microseconds (`megacpp_stp.runs.alive`).
_PATIENCE_S, _AGAIN_S = 0.5, 0.005


@contextmanager
def launcher_lock(directory: Path, *, node: int = 0) -> Iterator[None]:
    """Be a node's only launcher in a run directory; as node 0, find no rank of an earlier launch still there.

    Raises:
        UserError: The run is going on, or its processes have not ended yet.
    """
    if node:  # others may look for ranks just now; node 0 has, before it offered the run
        with _held(directory / f".launcher-{node}.lock", fcntl.LOCK_EX):
            yield
        return
    with _held(directory / LAUNCHER_LOCK, fcntl.LOCK_EX):
        with _held(directory / RANKS_LOCK, fcntl.LOCK_EX):
            pass  # whoever starts ranks is the launcher, and that is us from here on
        yield


def require_free(directory: Path) -> None:
    """Refuse where `launcher_lock` of node 0 would, and create nothing.

    Raises:
        UserError: The run is going on, or its processes have not ended yet.
    """
    for path in (directory / LAUNCHER_LOCK, directory / RANKS_LOCK):
        if path.exists():
            with _held(path, fcntl.LOCK_EX, create=False):
                pass


@contextmanager
def rank_lock(directory: Path) -> Iterator[None]:
    """Be one of the ranks that work in a run directory.

    Raises:
        UserError: A launcher is just preparing it.
    """
    with _held(directory / RANKS_LOCK, fcntl.LOCK_SH):
        yield


@contextmanager
def _held(path: Path, kind: int, *, create: bool = True) -> Iterator[None]:
    try:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)  # no child inherits it
        try:
            _take(handle, kind)
        except BaseException:
            os.close(handle)
            raise
    except BlockingIOError:
        raise UserError(
            "the run is going on there, or its processes have not ended yet",
            field="--run-dir",
            value=str(path.parent),
            fix="wait until it has ended, or end it",
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be locked: {error.strerror}",
            field="--run-dir",
            value=str(path.parent),
            fix="name a place that you may write to, on a file system with locks (Lustre: mounted with flock)",
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(handle)


def _take(handle: int, kind: int) -> None:
    """Lock an open file; what is only looked at is free again at once.

    Raises:
        BlockingIOError: Somebody works there.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(_AGAIN_S)
