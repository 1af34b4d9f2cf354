"""All runs in a folder at a glance: one row each, and a reason for what cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.alive import read_going_on, unseen
from megacpp_stp.runs.files import METRICS, PLAN, RECEIPT, shown
from megacpp_stp.runs.gate import Gate, gate_of
from megacpp_stp.runs.invalid import INVALID, invalid_reason
from megacpp_stp.runs.opening import open_regular

FOLDER_FORMAT = 1
_TAIL_BYTES = 2**18  # a record has some kB
_SIZES = {"tensor": "TP", "pipeline": "PP", "virtual": "VPP", "context": "CP", "expert": "EP"}


def is_run(directory: Path) -> bool:
    """Whether a directory is, or was, one run's."""
    return any(os.path.lexists(directory / name) for name in (RECEIPT, PLAN, METRICS, INVALID))


def list_folder(folder: Path) -> dict[str, Any]:
    """The runs in a folder as plain data, by name.

    Raises:
        UserError: No folder, or none with a run in it.
    """
    try:
        directories = sorted(path for path in folder.iterdir() if path.is_dir())
        found = [path for path in directories if is_run(path)]
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", field=shown(folder), fix="name a run directory, or a folder of them"
        ) from None
    if not found:
        raise UserError(
            "is neither a run directory nor a folder of them",
            field=shown(folder),
            fix="name the folder that `launch` made, or the one that it lies in",
        )
    return {
        "folder_format": FOLDER_FORMAT,
        "folder": str(folder),
        "runs": [describe(path) for path in found],
        "others": len(directories) - len(found),
    }


def describe(directory: Path) -> dict[str, Any]:
    """One run: its facts, or ``invalid`` or ``unreadable`` with the reason and nothing else."""
    name = directory.name
    try:
        reason = invalid_reason(directory)
        if reason is not None:
            return {"name": name, "status": "INVALID", "invalid": reason}
        return {"name": name, **_facts(directory)}
    except UserError as error:
        return {"name": name, "status": "unreadable", "unreadable": f"{Path(error.field or '').name}: {error.problem}"}
    except OSError as error:
        return {"name": name, "status": "unreadable", "unreadable": str(error.strerror)}


def _facts(directory: Path) -> dict[str, Any]:
    receipt, running = read_going_on(directory)
    gate = gate_of(receipt, field=str(directory / RECEIPT))
    last = last_record(directory / METRICS)
    done = last["iteration"] if last else 0
    planned = receipt.get("iterations_planned")
    best = min(receipt.get("validation", []), key=lambda record: record["lm_loss"], default=None)
    return {
        "recipe": receipt["recipe"]["name"],
        "status": receipt["status"],
        "reason": receipt["reason"],
        "running": running,
        "unseen": unseen(receipt, running),
        "regime": gate.regime_at(done) if gate is not None and done else None,
        "iterations_done": done,
        "iterations_planned": planned if type(planned) is int else None,
        "last_lm_loss": last["lm_loss"] if last else None,
        "best_validation": best and {"lm_loss": best["lm_loss"], "iteration": best["iteration"]},
        "stp": _stp(gate),
        "parallelism": _parallelism(receipt),
        "substrate": _substrate(receipt),
    }


def last_record(path: Path) -> dict[str, Any] | None:
    """The last whole record of a metrics file, read from its end; None when there is none.

    Raises:
        UserError: The file cannot be opened, or ends in no record.
    """
    if not os.path.lexists(path):
        return None
    with open_regular(path) as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(size - _TAIL_BYTES, 0))
        lines = handle.read(_TAIL_BYTES).splitlines()
    if not size:
        return None
    for line in reversed(lines[-2:]):  # the last may be torn
        record = _record_of(line)
        if record is not None:
            return record
    if len(lines) == 1 and size < _TAIL_BYTES:
        return None  # killed while it wrote the first
    raise UserError("ends in no metrics record", field=shown(path), fix="the file is damaged; use another run")


def _record_of(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        iteration, loss = record["iteration"], record.get("lm_loss")
        usable = type(iteration) is int and 0 < iteration < 2**53 and (loss is None or type(loss) is float)
        if not usable or (loss is not None and not abs(loss) < float("inf")):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {"iteration": iteration, "lm_loss": loss}


def _stp(gate: Gate | None) -> str:
    if gate is None:
        return "none"
    return f"{gate.weight:g} from {gate.first_live}" if gate.acts else "measured"


def _parallelism(receipt: Mapping[str, Any]) -> str | None:
    topology = receipt.get("topology")
    if not isinstance(topology, Mapping):
        return None
    found = {short: topology.get(name) for name, short in {**_SIZES, "data_parallel": "DP"}.items()}
    parts = [f"{short}{size}" for short, size in found.items() if type(size) is int and size > 1]
    return " ".join(parts) or "1 rank"


def _substrate(receipt: Mapping[str, Any]) -> str | None:
    hardware = value_at(receipt, ["substrate", "hardware"])
    world = value_at(receipt, ["topology", "world_size"])
    device = value_at(hardware, ["gpu"]) or value_at(hardware, ["device"])
    if not isinstance(device, str):
        return None
    return f"{world} x {device}" if type(world) is int and device != "cpu" else device
