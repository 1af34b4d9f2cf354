"""receipt.json: what really ran. Incomplete until the run says otherwise.

It answers four questions - which exact spec, which hybrid pattern, which patches were installed, which auxiliary
losses were on or delayed - and names substrate, data and parameters.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megacpp_stp.runs.files import RECEIPT, write_json

RECEIPT_VERSION = 1


class Receipt:
    """The receipt of a running process, on disk from its first line on.

    Args:
        directory: The run directory.
        facts: What is known at the start; see `megacpp_stp.training.facts`.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self._path = directory / RECEIPT
        self._content: dict[str, Any] = {
            "receipt_version": RECEIPT_VERSION,
            "status": "incomplete",
            "reason": "the run has not ended, or was killed",
            "started": _now(),
            "ended": None,
            **facts,
        }
        self._write()

    def update(self, **facts: Any) -> None:
        """Add or replace facts."""
        self._content.update(facts)
        self._write()

    def complete(self, **facts: Any) -> None:
        """The run did all that its plan asked for."""
        self._content.update(facts, status="complete", reason=None, ended=_now())
        self._write()

    def fail(self, reason: str, *, kind: str, **facts: Any) -> None:
        """The run ended early.

        Args:
            reason: In a sentence.
            kind: ``user`` for a mistake that the user can mend, ``crash`` for anything else.
            **facts: More to record.
        """
        self._content.update(facts, status="incomplete", reason=reason, failure_kind=kind, ended=_now())
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
