"""One run in one table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.alive import read_going_on, unseen
from megacpp_stp.runs.files import METRICS, PLAN, RECEIPT, shown, shown_lines
from megacpp_stp.runs.metrics import Record, mean_of, read_metrics
from megacpp_stp.runs.opening import require_regular
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.sides import read_side
from megacpp_stp.runs.what_ran import what_ran

_WINDOW = 10  # iterations at most that stand for "first" and "last" of a phase
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("lm loss (nats a token)", "lm_loss", "{:.3f}"),
    ("lm loss (bits a byte)", "bits_per_byte", "{:.3f}"),
    ("STP loss, raw", "stp_loss", "{:.4f}"),
    ("STP loss, weighted", "stp_weighted", "{:.5f}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
)


def summarise(directory: Path) -> dict[str, Any]:
    """The run's facts and its phases as plain data.

    Phases are the iterations before the STP gate and after it; a run without STP, or with its weight 0, has one.

    Raises:
        UserError: Not a readable run directory.
    """
    receipt, running = read_going_on(directory)
    path = directory / METRICS
    records = read_metrics(path) if path.exists() else []  # a run may end before its first iteration
    # STP of weight 0 is measured and has no gate. Whatever else a record says is shown.
    weight = value_at(receipt, ["auxiliary_losses", "stp", "weight"])
    has_gate = weight != 0 or any(record.get("stp_active") for record in records)
    phases = {
        "before the gate": [record for record in records if has_gate and record.get("stp_active") is False],
        "after the gate": [record for record in records if has_gate and record.get("stp_active") is True],
        "whole run": [record for record in records if not has_gate or "stp_active" not in record],
    }
    return {
        "directory": str(directory),
        "recipe": receipt["recipe"]["name"],
        "status": receipt["status"],
        "reason": receipt["reason"],
        "running": running,
        "unseen": unseen(receipt, running),
        "parameters": receipt["parameters"],
        "validation": receipt.get("validation", []),
        "substrate": receipt["substrate"],
        "resumed_from": [attempt["from_iteration"] for attempt in receipt.get("attempts", [])[1:]],
        "iterations": len(records),
        "phases": {name: _phase(found) for name, found in phases.items() if found},
    }


def _phase(records: Sequence[Record]) -> dict[str, Any]:
    window = min(_WINDOW, max(len(records) // 2, 1))
    return {
        "iterations": [records[0]["iteration"], records[-1]["iteration"]],
        "window": window,
        **{
            key: {"first": mean_of(records[:window], key), "last": mean_of(records[-window:], key)}
            for _, key, _ in _ROWS
            if key != "tokens_per_s"
        },
        # The first iteration of a process warms up; it would hide what the machine does.
        "tokens_per_s": mean_of(records[1:] if len(records) > 1 else records, "tokens_per_s"),
    }


def print_summary(directory: Path, console: Console) -> None:
    """Print `summarise` as one table."""
    facts = summarise(directory)
    title = Text(shown(f"{facts['recipe']}: {'running' if facts['running'] else facts['status']}"))
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("")
    for name, phase in facts["phases"].items():
        first, last = phase["iterations"]
        means = f"mean of {phase['window']} -> of {phase['window']}"
        table.add_column(f"{name}\niterations {first}-{last}\n{means}", justify="right")
    for label, key, form in _ROWS:
        cells = [_cell(phase[key], form) for phase in facts["phases"].values()]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table if facts["phases"] else title)
    if facts["phases"]:
        console.print("a -> b: mean of the first and of the last iterations, at most half of them each", markup=False)
    for record in facts["validation"]:
        console.print(
            f"validation after iteration {record['iteration']}: {record['lm_loss']:.3f} nats a token, "
            f"{record['bits_per_byte']:.3f} bits a byte",
            markup=False,
        )
    if facts["resumed_from"]:
        console.print(f"went on from iteration {', '.join(map(str, facts['resumed_from']))}", markup=False)
    if facts["unseen"]:
        console.print(f"incomplete: {facts['unseen']}", markup=False)
    elif facts["reason"] and not facts["running"]:
        console.print(f"incomplete: {shown_lines(facts['reason'])}", markup=False)
    if facts["parameters"]:
        stages = " + ".join(f"{count:,}" for count in facts["parameters"]["by_pipeline_rank"])
        console.print(f"parameters: {facts['parameters']['total']:,} ({stages} by pipeline rank)", markup=False)
    console.print(Text(f"run directory: {shown(directory)}"))


def print_what_ran(directory: Path, console: Console) -> None:
    """Print what the receipt says of a run: spec, pattern, patches, auxiliary losses, substrate, data.

    Raises:
        UserError: Not a readable run directory.
    """
    receipt, plan = read_receipt(directory), None
    with suppress(UserError):  # without it less can be said
        require_regular(directory / PLAN)
        plan = read_side(str(directory), directory / RECEIPT).plan
    table = Table(title="what ran", title_justify="left", show_header=False)
    for name, text in what_ran(receipt, plan).items():
        table.add_row(Text(name), Text(text))
    console.print(table)


def _cell(value: Any, form: str) -> str:
    if isinstance(value, dict):
        if value["first"] is None or value["last"] is None:
            return "-"
        return f"{form.format(value['first'])} -> {form.format(value['last'])}"
    return "-" if value is None else form.format(value)
