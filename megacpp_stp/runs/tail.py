"""Reading metrics.jsonl while it grows: what is new, and whether what was read before still stands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.metrics import Record
from megacpp_stp.runs.opening import open_regular

_CHUNK = 2**20
_LONGEST_LINE = 2**22
_LOOK_BACK = 256  # bytes before the place: a file that was cut back and grew again has others there
_LAST_ITERATION = 2**53
_LARGEST = 1e100


@dataclass(slots=True, kw_only=True)
class News:
    """What one look brought.

    Attributes:
        records: Whole new records, in order.
        from_start: Whether these are all records there are: what was read before no longer stands.
        damaged: How many whole lines were no record.
    """

    records: list[Record] = field(default_factory=list)
    from_start: bool = False
    damaged: int = 0


class Tail:
    """Follows one metrics file, which need not be there yet.

    A torn last line waits for its rest. A file that was cut back, as ``launch --resume`` does, or replaced, is read
    anew.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._place, self._before, self._identity, self._iteration = 0, b"", None, 0

    def look(self) -> News:
        """Read what is new.

        Raises:
            UserError: It is no regular file, cannot be read, or has a line longer than any record.
        """
        if not os.path.lexists(self._path):
            gone = self._place > 0
            self._forget()
            return News(from_start=gone)
        with open_regular(self._path) as handle:
            state = os.fstat(handle.fileno())
            identity: Any = (state.st_dev, state.st_ino)
            handle.seek(self._place - len(self._before))
            stands = identity == self._identity and handle.read(len(self._before)) == self._before
            news = News(from_start=not stands and self._place > 0)
            if not stands:
                self._forget()
                self._identity = identity
            handle.seek(self._place)
            rest = b""
            while chunk := handle.read(_CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(line + b"\n", news)
                if len(rest) > _LONGEST_LINE:
                    raise UserError("has a line longer than any record", field=shown(self._path), fix="use another run")
        return news

    def _take(self, line: bytes, news: News) -> None:
        self._place += len(line)
        self._before = (self._before + line)[-_LOOK_BACK:]
        record = _record(line)
        if record is None or record["iteration"] <= self._iteration:
            news.damaged += 1
            return
        self._iteration = record["iteration"]
        news.records.append(record)


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        iteration = record["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    usable = isinstance(record, dict) and type(iteration) is int and 0 < iteration < _LAST_ITERATION
    return record if usable else None


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Values that can be drawn, by name; those with parts, by tap or family, as ``name.part``."""
    found = {}
    for name, value in record.items():
        parts = {f"{name}.{part}": item for part, item in value.items()} if isinstance(value, dict) else {name: value}
        for part, item in parts.items():
            number = isinstance(item, int | float) and not isinstance(item, bool)
            if number and abs(item) < _LARGEST and math.isfinite(item):
                found[part] = float(item)
    return found
