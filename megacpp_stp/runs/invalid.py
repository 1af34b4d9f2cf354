"""invalid.json: a person's word that a run must not be used. It lies beside the receipt, which stays as it is."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import PLAN, RECEIPT, read_json, shown
from megacpp_stp.runs.opening import require_regular
from megacpp_stp.runs.receipt import now

INVALID = "invalid.json"
_VERSION = 1
_LONGEST = 400
_UNREADABLE = "(the reason cannot be read)"


def invalid_reason(directory: Path) -> str | None:
    """Why a run is invalid; None when nobody said that it is. The file's presence counts, whatever is in it."""
    path = directory / INVALID
    if not os.path.lexists(path):
        return None
    try:
        require_regular(path)
        reason = read_json(path).get("reason")
    except UserError:
        return _UNREADABLE
    return shown(reason) if isinstance(reason, str) and reason else _UNREADABLE


def require_valid(directory: Path) -> None:
    """Raise for a run that was marked invalid.

    Raises:
        UserError: With the reason.
    """
    reason = invalid_reason(directory)
    if reason is not None:
        raise UserError(
            f"is INVALID: {reason}",
            field=shown(directory),
            fix="leave this run out; nothing may be concluded from it",
        )


def invalidate(directory: Path, reason: str) -> bool:
    """Mark a run invalid, for good.

    Args:
        directory: A run directory, whole or damaged.
        reason: One line of text.

    Returns:
        False when it was marked before, with this reason.

    Raises:
        UserError: No run, no usable reason, another reason was given before, or the file cannot be written.
    """
    if not reason.strip() or not reason.isprintable() or len(reason) > _LONGEST:
        raise UserError(
            f"must be one printable line of at most {_LONGEST} characters",
            field="--reason",
            value=reason[:_LONGEST],
            fix="say in a sentence what is wrong with the run",
        )
    if not any((directory / name).is_file() for name in (RECEIPT, PLAN)):
        raise UserError(
            f"holds no {RECEIPT} and no {PLAN}", field=shown(directory), fix="name the directory of one run"
        )
    path = directory / INVALID
    try:
        # Made whole under a new name, then linked: a link never replaces what is there.
        handle, draft = tempfile.mkstemp(prefix=f".{INVALID}.", dir=directory)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o644)
                json.dump({"invalid_version": _VERSION, "reason": reason, "marked": now()}, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        except FileExistsError:
            return _refuse_another(directory, reason)
        finally:
            with suppress(OSError):
                os.unlink(draft)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}", field=shown(path), fix="make the directory writable"
        ) from None
    return True


def _refuse_another(directory: Path, reason: str) -> bool:
    earlier = invalid_reason(directory)
    if earlier == reason:
        return False
    raise UserError(
        f"is marked already: {earlier}",
        field=shown(directory / INVALID),
        fix="leave it; what was said once is not overwritten",
    )
