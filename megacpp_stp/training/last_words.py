"""What a failed run says last: the first failing rank's own error, and the end of its output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megacpp_stp.runs.failures import ASKED, first_failure
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.hangs import KIND as HUNG
from megacpp_stp.runs.hangs import ranks_text

_LINES = 12
_MOST_BYTES = 64 * 2**10


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(f"megacpp-stp: {text}", file=sys.stderr, flush=True)


def last_words(directory: Path, *, logs: Path) -> Iterator[str]:
    """Lines for people.

    Args:
        directory: The run directory.
        logs: Folder of this start's output, for when no rank said why it ended.
    """
    failure = first_failure(directory)
    if failure is not None and failure["kind"] == HUNG:
        yield f"the run hung: {shown(failure['text'])}"
        yield f"each rank's place is in {directory / 'hang-RANK.json'}, its stacks in hang-RANK.txt"
        return
    if failure is None:
        yield f"no rank said why; their output is in {logs}"
        return
    if failure["kind"] == ASKED:
        yield shown(failure["reason"])
        return
    if silent := failure.get("silent"):
        why = "killed from outside, as for want of memory, or ended with the rest; torchrun's summary has the signals"
        yield f"{ranks_text(silent)} ended without a word: {why}"
        yield f"rank {failure['rank']} lost its peer: {_one_line(failure['reason'])}"
    else:
        yield f"rank {failure['rank']} failed first: {_one_line(failure['reason'])}"
    folder = failure.get("logs")
    if failure["kind"] == "user" or not isinstance(folder, str):
        return
    path = directory / folder / "stderr.log"
    yield f"its output is in {path.parent}, and ends:"
    yield from (f"  {shown(line)}" for line in _tail(path))


def _one_line(reason: object) -> str:
    return str(reason).splitlines()[0] if str(reason) else "(nothing)"


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - _MOST_BYTES))
            text = handle.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-_LINES:]
