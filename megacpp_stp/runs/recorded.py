"""A run as a comparison needs it: receipt, plan, gate and records, checked whoever wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.env_guard import computing_environment
from megacpp_stp.plan.facts import Side, value_at
from megacpp_stp.runs.files import METRICS, PLAN, RECEIPT, read_json, shown
from megacpp_stp.runs.gate import DORMANT, Gate, gate_of
from megacpp_stp.runs.invalid import require_valid
from megacpp_stp.runs.metrics import Record, read_metrics
from megacpp_stp.runs.opening import require_regular
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.sides import read_side
from megacpp_stp.runs.what_ran import cell

Scalar = float | int | str | bool | None
_LAST_ITERATION = 2**53
_LARGEST = 1e100  # sums and squares of such are still finite


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedRun:
    """What one run left.

    Attributes:
        directory: Where it lies.
        name: What tables call it.
        receipt: From `read_receipt`.
        side: Receipt and, where it lies beside it, plan.
        gate: STP's schedule; None for a run without STP.
        records: Of each iteration, in order.
    """

    directory: Path
    name: str
    receipt: Mapping[str, Any]
    side: Side
    gate: Gate | None
    records: tuple[Record, ...]

    @property
    def seed(self) -> int | None:
        """Of the training: by the plan, whose digest holds it, else by the receipt; None when neither says."""
        plan = self.side.plan
        seed = value_at(plan, ["recipe", "training", "seed"]) if plan else value_at(self.receipt, ["seeds", "training"])
        return seed if type(seed) is int else None

    @property
    def is_complete(self) -> bool:
        """Whether the run did all that its plan asked for."""
        return bool(self.receipt["status"] == "complete")

    @property
    def validation(self) -> Sequence[Mapping[str, Any]]:
        """The evaluations, in order."""
        found = self.receipt.get("validation", [])
        return found if isinstance(found, list) else []

    @cached_property
    def last_iteration(self) -> int:
        """Of the records."""
        return int(self.records[-1]["iteration"])

    @cached_property
    def substrates(self) -> tuple[Any, ...]:
        """Of all attempts that left iterations, each once: a run that went on may have done so elsewhere."""
        return self._of_all_attempts("substrate")

    @cached_property
    def codes(self) -> tuple[Any, ...]:
        """Hashes of the code of megacpp-stp, likewise; None where a receipt does not say."""
        return self._of_all_attempts("code", "sha256")

    @cached_property
    def environments(self) -> tuple[Any, ...]:
        """What of the machine's environment changes what is computed, likewise; receipts of earlier runs do not say."""
        said = [each for each in self._of_all_attempts("environment") if isinstance(each, dict)]
        found: list[Any] = []
        for each in map(computing_environment, said):
            found += [each] if each not in found else []
        return tuple(found)

    def _of_all_attempts(self, *path: str) -> tuple[Any, ...]:
        found = [value_at(self.receipt, path)]
        for file in sorted(self.directory.glob(f"attempt-*/{RECEIPT}")):
            require_regular(file)
            earlier = value_at(read_json(file), path)
            if earlier is not None and earlier not in found and not self._was_undone(file.parent.name):
                found.append(earlier)
        return tuple(found)

    def _was_undone(self, attempt: str) -> bool:
        """Whether a later attempt began where this one did, or before: none of its iterations is left."""
        attempts = self.receipt.get("attempts", [])
        starts = [value_at(each, ["from_iteration"]) for each in attempts]
        number = attempt.removeprefix("attempt-")
        if not number.isdecimal() or not 1 <= int(number) < len(starts) or not all(type(at) is int for at in starts):
            return False
        return bool(min(starts[int(number) :]) <= starts[int(number) - 1])

    @property
    def plan_changed(self) -> bool:
        """Whether it went on with another plan than it began with."""
        attempts = self.receipt.get("attempts", [])
        return len({json.dumps(attempt.get("plan_digest")) for attempt in attempts}) > 1

    def values_of(self, metric: str) -> dict[int, float]:
        """One metric by iteration, where it has a value.

        Args:
            metric: A name of docs/runs.md; one part of a name that has parts as ``stp_loss_by_tap.6``.

        Raises:
            UserError: It is no number somewhere, or there is none at all.
        """
        found = {}
        for record in self.records:
            value = _look_up(record, metric)
            if value is None:
                continue
            if isinstance(value, str) or abs(value) > _LARGEST:
                raise UserError("is no usable number", field="--metric", value=metric, fix=self._metrics_to_choose())
            found[int(record["iteration"])] = float(value)
        if not found:
            raise UserError(f"is not in {self.name}", field="--metric", value=metric, fix=self._metrics_to_choose())
        return found

    def _metrics_to_choose(self) -> str:
        names = sorted(name for name, value in flat(self.records[-1]).items() if type(value) in (int, float))
        return "choose one of " + ", ".join(shown(name) for name in names if name != "iteration")


def read_run(directory: Path, *, name: str) -> RecordedRun:
    """Read a run for a comparison.

    Args:
        directory: Where it lies.
        name: What tables call it.

    Raises:
        UserError: Not a whole run directory, marked invalid, or without a record.
    """
    if not directory.is_dir():
        raise UserError("is no directory", field=shown(directory), fix="name a run directory")
    require_valid(directory)
    receipt = read_receipt(directory)
    require_regular(directory / PLAN)
    path = directory / METRICS
    records = read_metrics(path) if path.exists() else []
    if not records:
        raise UserError(
            "has no whole record: the run ended in its first iteration", field=shown(path), fix="use another run"
        )
    _check_records(records, path=path)
    _check_end(records, receipt, path=path)
    gate = gate_of(receipt, field=str(directory / RECEIPT))
    _check_evidence(records, gate, path=path)
    side = read_side(str(directory), directory / RECEIPT)
    _check_plan(side, path=directory / RECEIPT)
    return RecordedRun(
        directory=directory,
        name=shown(name),
        receipt=receipt,
        side=side,
        gate=gate,
        records=tuple(records),
    )


def _check_records(records: Sequence[Record], *, path: Path) -> None:
    """Refuse records that are not one of each iteration in turn, or hold what no run writes.

    Raises:
        UserError: With the place.
    """
    before = 0
    for record in records:
        iteration = record["iteration"]
        if iteration != before + 1 or iteration >= _LAST_ITERATION:
            raise UserError(
                f"iteration {iteration!r} follows {before}" if abs(iteration) < _LAST_ITERATION else "is no iteration",
                field=shown(path),
                fix="the file is damaged; use another run",
            )
        before = iteration
        for name, value in record.items():
            parts = value.values() if isinstance(value, dict) else (value,)
            if "." in name or not all(_is_scalar(part) for part in parts):  # a dot parts a tap from its value's name
                raise UserError(
                    f"{shown(name)} in iteration {iteration} is nothing that a run writes",
                    field=shown(path),
                    fix="the file is damaged; use another run",
                )


def _check_end(records: Sequence[Record], receipt: Mapping[str, Any], *, path: Path) -> None:
    """Refuse a complete run whose records end elsewhere than its receipt says.

    Raises:
        UserError: With both ends.
    """
    if receipt.get("status") != "complete":
        return
    done, last = receipt.get("iterations_done"), records[-1]
    if done != last["iteration"]:
        raise UserError(
            f"ends with iteration {last['iteration']}, and the receipt of the complete run says {done}",
            field=shown(path),
            fix="the file was cut; use another run",
        )
    loss = value_at(receipt, ["last", "lm_loss"])
    if loss is not None and loss != last.get("lm_loss"):
        raise UserError(
            f"ends with lm_loss {last.get('lm_loss')}, and the receipt says {shown(loss)}",
            field=shown(path),
            fix="the records are of another run than the receipt; use another run",
        )


def _check_evidence(records: Sequence[Record], gate: Gate | None, *, path: Path) -> None:
    """Refuse a receipt that the records contradict: what was asked for is not what ran.

    Raises:
        UserError: With the first iteration that was not as the schedule says.
    """
    for record in records:
        said, weight = record.get("stp_active"), record.get("stp_weight")
        wanted = gate is not None and gate.regime_at(record["iteration"]) != DORMANT
        if said is not wanted and (gate is not None or said is not None):
            raise UserError(
                f"says stp_active {shown(said)} in iteration {record['iteration']}, "
                f"where the receipt's schedule says {wanted}",
                field=shown(path),
                fix="what ran is not what the receipt says; use another run",
            )
        scheduled = None if gate is None else gate.weight_at(record["iteration"])
        if weight is not None and (scheduled is None or not math.isclose(weight, scheduled, rel_tol=1e-9)):
            raise UserError(
                f"says stp_weight {weight:g} in iteration {record['iteration']}, "
                f"where the receipt's schedule says {'nothing' if scheduled is None else f'{scheduled:g}'}",
                field=shown(path),
                fix="what ran is not what the receipt says; use another run",
            )


def _check_plan(side: Side, *, path: Path) -> None:
    """Refuse a receipt that says otherwise than the plan that it is of, where it repeats it.

    Raises:
        UserError: With the first thing that it says otherwise.
    """
    if side.plan is None:
        return
    parts = replace(side, kind="plan", receipt=None), replace(side, kind="receipt", plan=None)
    for item in compare(*parts).differences:
        if item.path.startswith("patches."):
            continue  # what became of those that were planned is the receipt's to say
        raise UserError(
            f"says {shown(item.path)} {cell(item.b)}, and its plan {cell(item.a)}",
            field=shown(path),
            fix="the receipt is not of this plan, or was edited; use another run",
        )


def _is_scalar(value: Any) -> bool:
    if value is None or isinstance(value, bool | str):
        return True
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _look_up(record: Record, metric: str) -> Scalar:
    value: Any = record.get(metric)
    if metric not in record:
        name, _, part = metric.partition(".")
        value = value_at(record, [name, part])
    found: Scalar = None if isinstance(value, dict) else value
    return found


def flat(record: Record) -> dict[str, Scalar]:
    """A record's values by name; those with parts, by tap or family, as ``name.part``."""
    found: dict[str, Scalar] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}.{part}": item for part, item in value.items()}
        else:
            found[name] = value
    return found
