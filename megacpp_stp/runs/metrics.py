"""metrics.jsonl: one object an iteration. docs/runs.md lists the names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import object_of
from megacpp_stp.runs.opening import reading

Record = dict[str, Any]
UNITS = {"lm_loss": "nats a token", "bits_per_byte": "bits a byte"}
"""Of the losses."""
NUMBERS = (
    "lm_loss",
    "bits_per_byte",
    "stp_loss",
    "stp_weight",
    "stp_weighted",
    "grad_norm",
    "tokens_per_s",
    "tflops_per_gpu",
    "mfu",
    "goodput",
    "step_time_s",
)

_LONGEST_LINE = 2**22  # bytes; a record of a thousand taps has less


class MetricsWriter:
    """Appends records to a run's metrics file; a record is one whole line or not there.

    Args:
        path: The file; created, and never overwritten.
        append: Go on with a file that may be there.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        mode: Literal["a", "x"] = "a" if append else "x"
        self._handle: TextIO = open(path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`

    def write(self, record: Record) -> None:
        """Append one record. A number that is not finite is written as null: bare NaN is no JSON."""
        self._handle.write(json.dumps(_finite(record), sort_keys=True, allow_nan=False) + "\n")

    def sync(self) -> None:
        """See that the records so far outlive the machine, as a checkpoint of theirs does."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def read_metrics(path: Path) -> list[Record]:
    """Read all records. A torn last line, as a killed run may leave, is left out.

    Raises:
        UserError: The file cannot be read, or a line before the last is not a record.
    """
    records: list[Record] = []
    damaged = None
    with reading(path) as handle:
        for number, line in enumerate(iter(partial(handle.readline, _LONGEST_LINE), b""), start=1):
            if damaged is not None:
                raise UserError(
                    f"line {damaged} is not a metrics record",
                    field=str(path),
                    fix="the file is damaged; use another run",
                )
            try:
                record = json.loads(line, object_pairs_hook=object_of)
                _check(record)
            except (ValueError, OverflowError, RecursionError):
                damaged = number
            else:
                records.append(record)
    return records


def _check(record: Any) -> None:
    """Refuse what our readers could not compute with.

    Raises:
        ValueError: Not an object with an iteration, or a number that is none.
    """
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        raise ValueError
    for name, value in record.items():
        number = isinstance(value, int | float) and math.isfinite(value)
        if name in NUMBERS and not (value is None or (number and not isinstance(value, bool))):
            raise ValueError


def last_of(record: Record) -> Record | None:
    """What a receipt keeps of the last iteration; None before the first."""
    names = ("iteration", "lm_loss", "bits_per_byte", "stp_loss", "peak_memory_bytes")
    return {name: _finite(record[name]) for name in names if name in record} or None


def mean_of(records: Sequence[Record], value: Callable[[Record], float | None] | str) -> float | None:
    """Mean of one value over records that have it; None when none has."""
    pick = value if callable(value) else lambda record: record.get(value)
    found = [number for record in records if (number := pick(record)) is not None]
    return sum(found) / len(found) if found else None
