"""Run directories in which nothing has run yet: their launcher was killed before it had written a receipt."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import RECEIPT, exists_already
from megacpp_stp.runs.lock import LAUNCHER_LOCK, RANKS_LOCK

# What a start writes before the receipt, in this order; the last two are halves of a file, of the process in the name.
_OURS = re.compile(
    rf"{re.escape(LAUNCHER_LOCK)}|{re.escape(RANKS_LOCK)}|plan\.json|\.plan\.json\.\d+|\.receipt\.json\.\d+"
)


def nothing_has_run(directory: Path) -> bool:
    """Whether a directory is empty, or holds only what a start writes before the receipt, its lock first."""
    try:
        with os.scandir(directory) as found:
            kinds = {entry.name: entry.is_file(follow_symlinks=False) for entry in found}
    except OSError:
        return False
    ours = all(is_file and _OURS.fullmatch(name) for name, is_file in kinds.items())
    return ours and (not kinds or LAUNCHER_LOCK in kinds)


def not_new(path: Path) -> UserError:
    """What to say of a place where a new run cannot begin, with a way out that is open."""
    if not path.exists():
        return UserError("is a link to nothing", field="--run-dir", value=str(path), fix="name a new directory")
    if nothing_has_run(path):
        problem, fix = "exists already, and nothing has run there", "begin there by the same command with --resume"
        return UserError(problem, field="--run-dir", value=str(path), fix=f"{fix}, or name a new directory")
    if (path / RECEIPT).exists():
        return exists_already(path)
    return UserError("exists already, and holds no run", field="--run-dir", value=str(path), fix="name a new directory")
