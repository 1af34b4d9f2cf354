"""error-RANK.json: what each failed rank saw, and which of them failed first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_json

_PATTERN = "error-*.json"


def report_failure(directory: Path, *, rank: int, error: BaseException) -> None:
    """Write down what ended one rank. When even that fails, the launcher still has the exit status."""
    kind = "user" if isinstance(error, UserError) else "crash"
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    content = {"rank": rank, "kind": kind, "reason": text, "time": time.time()}
    try:
        write_json(directory / f"error-{rank}.json", content)
    except OSError:
        return


def first_failure(directory: Path) -> dict[str, Any] | None:
    """The earliest failure: the others are mostly its consequences. None when no rank wrote one."""
    found = []
    for path in sorted(directory.glob(_PATTERN)):
        try:
            found.append(read_json(path))
        except UserError:
            continue  # a rank that was killed while it wrote
    return min(found, key=lambda failure: (failure["kind"] != "user", failure["time"]), default=None)
