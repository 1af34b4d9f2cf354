"""The checkpoints in a run directory: which are whole, and which one Megatron is to load.

Megatron (``dist_checkpointing/serialization.py:save``) writes ``metadata.json`` into a checkpoint's folder when all
else is there, then the iteration into a tracker file. It writes both in place, so that a process that is killed can
leave either of them empty.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_text

CHECKPOINTS = "checkpoints"
_TRACKER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,})")
_LAST_FILE = "metadata.json"


def latest_checkpoint(directory: Path) -> int:
    """Iteration of the newest whole checkpoint in a run directory; 0 when there is none."""
    return max((iteration for iteration, path in _folders(directory).items() if _is_whole(path)), default=0)


def settle_checkpoints(directory: Path, *, iteration: int, aside: Path) -> None:
    """Leave what Megatron needs to load one checkpoint, and move aside what is newer or was being written.

    Args:
        directory: The run directory.
        iteration: From `latest_checkpoint`.
        aside: A folder for the rest. Where checkpoints lie on another file system, as behind a link, it is a folder
            of its name among them.
    """
    for number, path in _folders(directory).items():
        if number > iteration:
            _move(path, aside)
    tracker = directory / CHECKPOINTS / _TRACKER
    found = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.exists() else ""
    wanted = str(iteration) if iteration else ""
    if found == wanted and (wanted or not tracker.exists()):
        return
    if tracker.exists():
        _move(tracker, aside)
    if wanted:
        write_text(tracker, wanted)


def _folders(directory: Path) -> dict[int, Path]:
    found = {}
    for path in sorted((directory / CHECKPOINTS).glob("iter_*")):
        if match := _FOLDER.fullmatch(path.name):
            found[int(match[1])] = path
    return found


def _is_whole(path: Path) -> bool:
    try:
        read_json(path / _LAST_FILE)
    except UserError:
        return False
    return True


def _move(path: Path, aside: Path) -> None:
    place = aside / CHECKPOINTS
    place.mkdir(exist_ok=True)
    try:
        os.rename(path, place / path.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        place = path.parent / aside.name
        place.mkdir(exist_ok=True)
        os.rename(path, place / path.name)
