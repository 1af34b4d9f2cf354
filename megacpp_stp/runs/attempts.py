"""Going on with a run: its directory is brought back to a checkpoint, and what came after it is moved aside.

Nothing is deleted: what attempt 1 of a run left beyond the checkpoint lies in ``attempt-1``. Each step can be cut off
by a kill and done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.plan.changes import check_changes
from megacpp_stp.recipe import restore_recipe
from megacpp_stp.runs.begun import nothing_has_run
from megacpp_stp.runs.checkpoints import CHECKPOINTS, latest_checkpoint, settle_checkpoints
from megacpp_stp.runs.files import ENV, EXIT, METRICS, PATCHES, PLAN, RANKS, RECEIPT, read_json, write_json
from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.runs.receipt import Receipt, plan_facts, read_receipt
from megacpp_stp.runs.sides import check_plan

_REWRITTEN = (ENV, EXIT, PATCHES, RANKS)  # by the next attempt


def read_run_plan(directory: Path) -> dict[str, Any]:
    """The plan that a run follows.

    Raises:
        UserError: No run directory, or a plan that was edited.
    """
    if not directory.is_dir():
        raise UserError("is no directory", field="--run-dir", value=str(directory), fix="name the run's directory")
    plan = read_json(directory / PLAN)
    if plan.get("digest") != plan_digest(plan):
        raise UserError(
            "does not match its own digest: it was edited", field=str(directory / PLAN), fix="start a new run"
        )
    check_plan(plan, given=str(directory), path=directory / PLAN)
    if plan["device"] not in ("cpu", "cuda"):
        raise UserError("names no device", field=str(directory / PLAN), fix="start a new run")
    restore_recipe(plan["recipe"])  # or says what is wrong with it
    return plan


def find_continuation(directory: Path, plan: Mapping[str, Any], *, may_change: bool) -> int | None:
    """Where the run in a directory goes on with a plan. Changes nothing.

    Args:
        directory: The run directory.
        plan: The plan to go on with, as plain data.
        may_change: Whether it may differ from the run's.

    Returns:
        Iteration of the checkpoint to load; 0 where nothing was saved or nothing has run yet, and the run begins anew;
        None when the run is complete and the plan asks for no more.

    Raises:
        UserError: The run cannot go on, or not with this plan.
    """
    if nothing_has_run(directory) and not (directory / PLAN).exists():
        return 0
    planned = read_run_plan(directory)
    check_changes(planned, plan, allowed=may_change)
    if nothing_has_run(directory):
        return 0
    receipt = read_receipt(directory)
    _require_begun(receipt, directory / RECEIPT)
    _require_own(directory / METRICS)
    for saved in (planned, plan):
        if saved["recipe"]["training"]["checkpoint"] is None:
            raise UserError(
                "is null: the run saves nothing to go on from", field="training.checkpoint", fix="start a new run"
            )
    wanted = plan["recipe"]["training"]["iterations"]
    if receipt["status"] == "complete" and receipt.get("iterations_done") == wanted:
        return None
    iteration, done = latest_checkpoint(directory), _last_iteration(directory)
    if iteration > wanted:
        raise UserError(
            f"is less than the {iteration} that the run has done",
            field="training.iterations",
            value=wanted,
            fix="raise it",
        )
    if done < iteration:
        raise UserError(
            f"ends with iteration {done}, and the checkpoint is of {iteration}: records are missing",
            field=str(directory / METRICS),
            fix="bring the file back, or start a new run",
        )
    if not iteration and done > planned["recipe"]["training"]["checkpoint"]["interval"]:
        raise UserError(
            f"has no checkpoint of a run that came to iteration {done}",
            field=str(directory / CHECKPOINTS),
            fix="bring the checkpoints back, or start a new run",
        )
    return iteration


def rewind(directory: Path, plan: Mapping[str, Any], *, iteration: int) -> None:
    """Bring a run directory back to the checkpoint, ready for the next attempt. The caller holds its lock.

    Args:
        directory: The run directory.
        plan: The plan to go on with, as plain data.
        iteration: From `find_continuation`.

    Raises:
        UserError: The directory has changed since then.
    """
    if latest_checkpoint(directory) != iteration:
        raise UserError("has changed meanwhile", field="--run-dir", value=str(directory), fix="try again")
    receipt = Receipt(directory)
    aside = _new_folder(directory, receipt.attempts)
    for name in (PLAN, RECEIPT):
        shutil.copyfile(directory / name, aside / name)
    told = (path for pattern in ("error-*.json", "hang*.*") for path in directory.glob(pattern))
    for path in (*(directory / name for name in _REWRITTEN), *told):
        if path.exists():
            os.rename(path, aside / path.name)
    cut_metrics(directory / METRICS, iteration=iteration, aside=aside / METRICS)
    settle_checkpoints(directory, iteration=iteration, aside=aside)
    interval = read_run_plan(directory)["recipe"]["training"]["eval_interval"]
    write_json(directory / PLAN, plan)
    facts = {name: value for name, value in plan_facts(plan).items() if value is not None}
    receipt.begin_attempt(
        from_iteration=iteration,
        validation=_until(receipt.validation, iteration, interval=interval),
        **facts,
    )


def _require_begun(receipt: Mapping[str, Any], path: Path) -> None:
    """Refuse a receipt that does not say what each attempt adds to: ranks would fall over it one by one.

    Raises:
        UserError: With what it does not say.
    """
    try:
        is_time = datetime.fromisoformat(receipt.get("started", "")).tzinfo is not None
    except (TypeError, ValueError):
        is_time = False
    if not is_time or not receipt.get("attempts"):
        name = "attempts" if is_time else "started"
        raise UserError(
            f"does not say {name} as a run writes it", field=str(path), fix="the file is damaged; start a new run"
        )


def _require_own(path: Path) -> None:
    """Refuse to cut, and to go on with, a file that lies elsewhere.

    Raises:
        UserError: It is a link.
    """
    if path.is_symlink():
        raise UserError("is a link: what it leads to would be cut", field=str(path), fix="put the file itself there")


def _last_iteration(directory: Path) -> int:
    """Of the records; 0 when there is none."""
    path = directory / METRICS
    records = read_metrics(path) if path.exists() else []
    return int(records[-1]["iteration"]) if records else 0


def cut_metrics(path: Path, *, iteration: int, aside: Path) -> None:
    """Keep the records up to an iteration; move what follows, a torn last line too, into a file of its own.

    Raises:
        UserError: A line before the last is not a record.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = 0
    for number, line in enumerate(lines, start=1):
        done = _iteration_of(line)
        if done is None and number < len(lines):
            raise UserError(
                f"line {number} is not a metrics record", field=str(path), fix="the file is damaged; start a new run"
            )
        if done is None or done > iteration:
            break
        kept = number
    if kept == len(lines):
        return
    with open(aside, "xb") as handle:
        handle.writelines(lines[kept:])
        handle.flush()
        os.fsync(handle.fileno())
    os.truncate(path, sum(map(len, lines[:kept])))


def _iteration_of(line: bytes) -> int | None:
    """Of a record; None for what is not a whole one."""
    try:
        iteration = json.loads(line)["iteration"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return iteration if type(iteration) is int else None


def _new_folder(directory: Path, attempts: int) -> Path:
    """For what the last attempt left. One that was killed while it prepared leaves a folder of its own."""
    number = attempts
    while True:
        path = directory / f"attempt-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def _until(validation: list[dict[str, Any]], iteration: int, *, interval: int) -> list[dict[str, Any]]:
    """Evaluations that the checkpoint has seen.

    One in the loop comes before the checkpoint of the same iteration; the one that ends a run comes after it.
    """
    before = [record for record in validation if record["iteration"] < iteration]
    at = [record for record in validation if record["iteration"] == iteration and iteration % interval == 0]
    return before + at[:1]
