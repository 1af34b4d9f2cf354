"""Which code of ours runs: by content, and by the commit of the work tree that it lies in, if it does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import megacpp_stp
from megacpp_stp.patches.registry import code_hash

_TIMEOUT_S = 10.0
# Whatever the work tree's configuration says, nothing but git is started.
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")


def code_facts(package: Path = Path(megacpp_stp.__file__).parent) -> dict[str, Any]:
    """For a receipt.

    Args:
        package: Folder of the package.

    Returns:
        ``version``; ``sha256`` over all of the package's Python files; ``commit`` of the git work tree that tracks
        them and whether they were ``modified`` since, both null where none does.
    """
    commit = modified = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package, "rev-parse", "--verify", "HEAD")
        changes = _git(package, "status", "--porcelain", "--", ".")
        modified = None if changes is None else bool(changes)
    return {"version": megacpp_stp.__version__, "sha256": code_hash(), "commit": commit, "modified": modified}


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None where it is not installed, or says no."""
    # A hook that started the run would have set these for its own repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            [*_GIT, *words], cwd=folder, env=clean, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
