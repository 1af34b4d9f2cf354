"""A run directory's files: names, and writing them so that a killed process leaves whole files only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError

PLAN = "plan.json"
RECEIPT = "receipt.json"
METRICS = "metrics.jsonl"
PATCHES = "patches.json"
ENV = "env.json"
EXIT = "exit.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: A NaN or infinity: callers say null and why, since bare NaN is no JSON.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read one of the files above.

    Raises:
        UserError: Missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field=str(path), fix="is this a run directory?") from None
    except ValueError:
        raise UserError("is not JSON", field=str(path), fix="the file is damaged; use another run") from None


def create_run_directory(path: Path) -> None:
    """Create a new run directory.

    Raises:
        UserError: It is there already (nothing is ever overwritten), or it cannot be created.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError("exists already", field="--run-dir", value=str(path), fix="name a new directory") from None
    except OSError as error:
        raise UserError(
            f"cannot be created: {error.strerror}",
            field="--run-dir",
            value=str(path),
            fix="name a place you may write to",
        ) from None
