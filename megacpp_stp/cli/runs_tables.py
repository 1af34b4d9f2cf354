"""What ``runs`` prints for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.compare import Comparison, PairResult, Point, RunResult, validation_of
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.equality import Equality
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.metrics import UNITS

_LOUD = "bold white on red"
_MOST_DIFFERENCES = 12


def print_invalid(reason: str, console: Console) -> None:
    """Say that a run is invalid, in place of its numbers."""
    console.print(Text(f" INVALID: {reason} ", style=_LOUD))
    console.print(Text("its numbers are in no table; receipt and metrics lie in its directory as they were"))


def print_folder(found: Mapping[str, Any], console: Console) -> None:
    """Print `list_folder`."""
    table = Table(title=Text(f"runs in {shown(found['folder'])}"), title_justify="left")
    for column in ("run", "status", "regime"):
        table.add_column(column)
    for column in ("iterations", "last loss", "best validation"):
        table.add_column(column, justify="right")
    for column in ("STP", "parallelism", "substrate"):
        table.add_column(column)
    said = []
    for run in found["runs"]:
        name = shown(run["name"])
        for word in ("invalid", "unreadable"):
            if word in run:
                table.add_row(Text(name), Text(run["status"], style=_LOUD if word == "invalid" else "red"))
                said.append(f"{name} is {run['status']}: {run[word]}")
                break
        else:
            table.add_row(*map(Text, _folder_row(name, run)))
            if not run["running"] and (why := run["unseen"] or run["reason"]):
                said.append(f"{name} is {run['status']}: {shown(why)}")
    console.print(table)
    for line in said:
        console.print(Text(line))
    if found["others"]:
        console.print(Text(f"directories that are no runs: {found['others']}"))


def _folder_row(name: str, run: Mapping[str, Any]) -> list[str]:
    best = run["best_validation"]
    return [
        name,
        "running" if run["running"] else run["status"],
        run["regime"] or "-",
        f"{run['iterations_done']}/{_or_dash(run['iterations_planned'])}",
        _number(run["last_lm_loss"]),
        f"{_number(best['lm_loss'])} @ {best['iteration']}" if best else "-",
        run["stp"],
        _or_dash(run["parallelism"]),
        shown(_or_dash(run["substrate"])),
    ]


def print_comparison(found: Comparison, console: Console) -> None:
    """Print `compare_runs`."""
    loud = not found.title.startswith("controlled")
    console.print(Text(found.title, style=_LOUD if loud else "bold"))
    console.print(Text(f"{counted(len(found.window.iterations))}: {found.window.why}"))
    table = Table()
    unit = UNITS[validation_of(found.metric)]
    for column in ("", "run"):
        table.add_column(column)
    for column in (
        "seed",
        "STP",
        "in the window",
        "mean",
        "best @ iteration",
        "last",
        f"best validation @ iteration\n({unit})",
    ):
        table.add_column(column, justify="right")
    for run in found.runs:
        table.add_row(*map(Text, _run_row(run)))
    console.print(table)
    for pair in found.pairs:
        for line in _pair_lines(pair):
            console.print(Text(line))
    for note in found.notes:
        console.print(Text(f"note: {note}"))


def _run_row(run: RunResult) -> list[str]:
    weight = "none" if run.stp_weight is None else f"{run.stp_weight:g}"
    return [
        run.arm,
        run.name + ("" if run.status == "complete" else " (incomplete)"),
        _or_dash(run.seed),
        weight if run.gate is None else f"{weight} from {run.gate}",
        ", ".join(f"{count} {regime}" for regime, count in run.regimes.items()) or "-",
        _number(run.mean),
        _point(run.best),
        _number(run.last.value),
        _point(run.best_validation),
    ]


def _pair_lines(pair: PairResult) -> list[str]:
    relative = "" if pair.relative is None else f" ({pair.relative:+.2%})"
    interval = ""
    if pair.interval is not None:
        interval = f", {CONFIDENCE:.0%} interval {pair.interval.low:+.4g} to {pair.interval.high:+.4g}"
    lines = [
        f"{pair.b} - {pair.a}: {pair.difference:+.4g}{relative}{interval}: {pair.verdict}",
        f"  interval: {pair.method}",
        f"  {pair.standing}",
    ]
    if len(pair.seeds) > 1:
        each = ", ".join(f"{seed}: {value:+.4g}" for seed, value in zip(pair.seeds, pair.by_seed, strict=True))
        lines.append(f"  by seed: {each}")
    differing = _differing(pair)
    lines += [f"    {line}" for line in differing[:_MOST_DIFFERENCES]]
    rest = len(differing) - _MOST_DIFFERENCES
    return [*lines, f"    and {rest} more: `megacpp-stp diff` lists them"] if rest > 0 else lines


def _differing(pair: PairResult) -> list[str]:
    """A line for each leaf; one for all of STP where a run has none."""
    sides = {side: {item["path"]: item[side] for item in pair.differences} for side in ("a", "b")}
    found = []
    for path in sides["a"]:
        if path.startswith("stp.") and None in (sides["a"].get("stp.weight", 0), sides["b"].get("stp.weight", 0)):
            continue
        found.append(f"{shown(path)}: {pair.a} {_value(sides['a'][path])}, {pair.b} {_value(sides['b'][path])}")
    for side, other in (("a", "b"), ("b", "a")):
        if sides[side].get("stp.weight", 0) is None:
            has = ", ".join(f"{path[4:]} {_value(value)}" for path, value in sides[other].items() if path[:4] == "stp.")
            letters = {"a": pair.a, "b": pair.b}
            found.append(f"stp: {letters[side]} none, {letters[other]} {has}")
    return found


def print_equality(found: Sequence[Equality], console: Console) -> None:
    """Print `check_equal`."""
    for pair in found:
        first = pair.first_difference
        if first is None:
            what = f"{counted(pair.iterations)}, {len(pair.names)} values each, {pair.validations} evaluations"
            console.print(Text(f"{pair.a} and {pair.b} are equal bit for bit: {what}"))
        else:
            where = "after the last iteration" if first.iteration is None else f"in iteration {first.iteration}"
            more = f"; {first.names} values differ there" if first.names > 1 else ""
            console.print(
                Text(
                    f"{pair.a} and {pair.b} differ first {where}: {shown(first.name)} is "
                    f"{_value(first.a)} and {_value(first.b)}{more}"
                )
            )
        for line in pair.not_compared:
            console.print(Text(f"  not compared: {line}"))


def _point(point: Point | None) -> str:
    return "-" if point is None else f"{_number(point.value)} @ {point.iteration}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return shown(value) if isinstance(value, str) else json.dumps(value)
