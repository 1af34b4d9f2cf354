"""A run directory's files: names, and writing them so that a killed process leaves whole files only."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError

PLAN = "plan.json"
RECEIPT = "receipt.json"
METRICS = "metrics.jsonl"
PATCHES = "patches.json"
RANKS = "ranks.json"
ENV = "env.json"
EXIT = "exit.json"

_MOST_BYTES = 64 * 2**20  # the plan of a thousand layers is a fraction of 1 MB
_MOST_NESTING = 64


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: A NaN or infinity: callers say null and why, since bare NaN is no JSON.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the files above; anybody may have written it.

    Raises:
        UserError: Missing, unreadable, too large, or not one whole JSON object.
    """
    fix = "name a run directory, or one of its files"
    try:
        # Opening a pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as handle:
            if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
                raise UserError("is no regular file", field=shown(path), fix="is this a run directory?")
            content = handle.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError("is larger than any file of a run", field=shown(path), fix=fix)
        document = json.loads(content, object_pairs_hook=object_of)
        _check_values(document)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", field=shown(path), fix="is this a run directory?"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError("is not JSON, or only a part of it", field=shown(path), fix=fix) from None
    if not isinstance(document, dict):
        raise UserError("is no JSON object", field=shown(path), fix=fix)
    return document


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads``.

    Raises:
        ValueError: A name is there twice: readers would not agree on which of its values counts.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _check_values(document: Any) -> None:
    """Refuse what Python reads although it is no JSON, and nesting that no file of a run has.

    Raises:
        ValueError: NaN, an infinity, or nesting too deep.
    """
    waiting = [(document, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _MOST_NESTING or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError
        if isinstance(value, (dict, list)):
            waiting += ((item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


def shown(value: object) -> str:
    """Text for a terminal: nothing in a foreign file may move its cursor or stop it from printing."""
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


def shown_lines(value: object) -> str:
    """The same of text that may have several lines."""
    return "\n".join(shown(line) for line in str(value).split("\n"))


def exists_already(path: Path) -> UserError:
    """What to say of a run directory that is there and is not to be continued."""
    return UserError(
        "exists already",
        field="--run-dir",
        value=str(path),
        fix="name a new directory, or go on with the run that is there by --resume",
    )


def create_run_directory(path: Path) -> None:
    """Create a new run directory.

    Raises:
        UserError: It is there already (nothing is ever overwritten), or it cannot be created.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise exists_already(path) from None
    except OSError as error:
        raise UserError(
            f"cannot be created: {error.strerror}",
            field="--run-dir",
            value=str(path),
            fix="name a place you may write to",
        ) from None
