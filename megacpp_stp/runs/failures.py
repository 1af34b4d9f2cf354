"""error-RANK.json: what each failed rank saw, and which of them failed first."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import PLAN, read_json, write_json
from megacpp_stp.runs.hangs import KIND as HUNG
from megacpp_stp.runs.hangs import hang_text, ranks_text

NONFINITE = "nonfinite"  # of a failure, in receipts and error files
ASKED = "asked"
_ASKED_TEXT = "Megatron ended the run early, as exit-duration-in-mins and exit-signal-handler ask it to"
CAUSES = ("lm_loss", "stp_loss", "gradient")  # of it, as they follow from one another
_PATTERN = "error-*.json"
# What gloo and NCCL say when the process at the other end is gone.
_LOST_PEER = re.compile(r"(closed|reset) by peer|[Bb]roken pipe|remote process (exited|has been terminated)")


def report_failure(directory: Path, *, rank: int, error: BaseException) -> None:
    """Write down what ended one rank. When even that fails, the launcher still has the exit status."""
    content = {
        "rank": rank,
        "kind": kind_of(error),
        "reason": text_of(error),
        "time": time.time(),
        "logs": _logs(directory),
        "cause": getattr(error, "cause", None),
        "agreed": getattr(error, "agreed", False),
    }
    try:
        write_json(directory / error_file(rank), content)
    except OSError:
        return


def error_file(rank: int) -> str:
    """Name of the file in which a rank says what ended it."""
    return f"error-{rank}.json"


def kind_of(error: BaseException) -> str:
    """``user`` for a mistake that the user can mend; what the error says of itself, as ``nonfinite`` or ``hang``;
    ``asked`` for an exit that is no error, by which Megatron ends a run whose options say so; else ``crash``."""
    if isinstance(error, SystemExit) and not error.code:
        return ASKED
    return "user" if isinstance(error, UserError) else str(getattr(error, "kind", "crash"))


def text_of(error: BaseException) -> str:
    """What it says, with its type unless that says nothing more."""
    kind = kind_of(error)
    if kind == ASKED:
        return _ASKED_TEXT
    return f"{type(error).__name__}: {error}" if kind == "crash" else str(error)


def _logs(directory: Path) -> str | None:
    """The folder with this rank's output, from the run directory; torchrun names a file in it."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        return str(Path(told).resolve().parent.relative_to(directory.resolve())) if told else None
    except ValueError:
        return None


def first_failure(directory: Path) -> dict[str, Any] | None:
    """The earliest failure: the others are mostly its consequences. None when no rank wrote one.

    Its ``text`` is for people: with the rank, or, of a run that hung, with what all ranks said. Where it only lost a
    peer, ``silent`` are the ranks that said nothing: one that is killed, as for want of memory, has no last word.
    """
    found = []
    for path in sorted(directory.glob(_PATTERN)):
        try:
            found.append(read_json(path))
        except UserError:
            continue  # a rank that was killed while it wrote
    first = min(found, key=lambda failure: (failure["kind"] != "user", failure["time"]), default=None)
    if first is None:
        return None
    if first["kind"] == NONFINITE:
        return _with_others(found)
    text = hang_text(directory) if first["kind"] == HUNG else None
    text = text or f"rank {first['rank']}: {first['reason']}"
    if first["kind"] == "crash" and _LOST_PEER.search(first["reason"]) and (silent := _silent(directory, found)):
        return {**first, "silent": silent, "text": f"{ranks_text(silent)} ended without a word; {text}"}
    return {**first, "text": text}


def _silent(directory: Path, found: list[dict[str, Any]]) -> list[int]:
    """The ranks without an error of their own; none where the plan cannot be read."""
    try:
        world_size = int(read_json(directory / PLAN).get("world_size", 0))
    except UserError:
        return []
    return sorted(set(range(world_size)) - {failure["rank"] for failure in found})


def _with_others(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What was not finite first, by cause: a loss spoils its gradients. The other ranks that saw it are named."""
    seen = [failure for failure in found if failure["kind"] == NONFINITE]
    first = min(seen, key=lambda failure: (_by_cause(failure), failure["time"]))
    if first.get("agreed"):  # by all ranks, in words that name those that saw it
        return {**first, "text": first["reason"]}
    others = [failure["rank"] for failure in seen if failure is not first]
    more = f"; {ranks_text(others)} too" if others else ""
    reason = first["reason"] + more
    return {**first, "reason": reason, "text": f"rank {first['rank']}: {reason}"}


def _by_cause(failure: dict[str, Any]) -> int:
    cause = failure.get("cause")
    return CAUSES.index(cause) if cause in CAUSES else len(CAUSES)
