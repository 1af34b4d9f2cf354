"""``diff``: what really differs between two recipes, plans, receipts or runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.options import Device, Form, FormOption, console, print_json
from megacpp_stp.plan.diff import DIFFERENT, EQUAL, Consequence, PlanDiff, compare
from megacpp_stp.runs.files import shown
from megacpp_stp.runs.sides import read_sides

if TYPE_CHECKING:
    from rich.console import Console

_MOST_ITEMS = 8
_SideArgument = Annotated[
    str,
    typer.Argument(metavar="SIDE", help="A recipe's name or .yaml, a plan.json, a receipt.json or a run directory."),
]


def diff_command(
    a: _SideArgument,
    b: _SideArgument,
    device: Annotated[
        Device | None,
        typer.Option(help="What recipes are planned for; default: the other side's device, or cuda."),
    ] = None,
    format: FormOption = Form.TABLE,
) -> None:
    """Show what really differs between two plans. Exit status 0: nothing, 1: something."""
    found = compare(*read_sides(a, b, device=device.value if device else None))
    if format is Form.JSON:
        print_json(found.as_dict())
    else:
        print_diff(found, console())
    raise typer.Exit(int(found.verdict == DIFFERENT))


def print_diff(found: PlanDiff, console: Console) -> None:
    """Print a comparison for people."""
    from rich.table import Table
    from rich.text import Text

    sides = {"A": found.a, "B": found.b}
    for letter, side in sides.items():
        console.print(Text(f"{letter}: {shown(side.given)} ({side.kind}, digest {shown(side.digest)[:12]})"))
    for group in dict.fromkeys(item.group for item in found.differences):
        table = Table(title=group, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("", "A", "B"):
            table.add_column(column, overflow="fold")
        for item in found.differences:
            if item.group == group:
                table.add_row(Text(shown(item.path)), Text(_value(item.a)), Text(_value(item.b)))
        console.print(table)
    for line in _closing_lines(found):
        console.print(Text(line))


def _closing_lines(found: PlanDiff) -> list[str]:
    lines = [f"follows: {_consequence(item)}" for item in found.consequences if item.path != "digest"]
    for item in found.labels:
        what = item.path if item.path == "overrides" else f"in name only: {item.path}"
        lines.append(f"{what}: A {_value(item.a)}, B {_value(item.b)}")
    for idle in found.idle_overrides:
        lines.append(f"equal in effect: {idle.side.upper()}'s override {shown(idle.override)}")
    if not found.complete:
        lines.append("a receipt without its plan.json beside it: only what a receipt holds was compared")
    count = len(found.differences)
    if found.verdict == DIFFERENT:
        lines.append(f"different: {count} value{'s' if count != 1 else ''}")
    elif found.verdict == EQUAL:
        lines.append("equal")
    else:
        lines.append("equal in effect: every value that a run depends on is the same")
    return lines


def _consequence(item: Consequence) -> str:
    what = {"argv": "argument", "layout.layers": "layer"}.get(item.path)
    if what is None:
        return f"{item.path}: A {_value(item.a)}, B {_value(item.b)}"
    count = len(item.items)
    more = f" and {count - _MOST_ITEMS} more" if count > _MOST_ITEMS else ""
    named = " ".join(map(shown, item.items[:_MOST_ITEMS]))
    return f"{item.path}: {count} {what}{'s differ' if count != 1 else ' differs'}: {named}{more}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return shown(value) if isinstance(value, str) else json.dumps(value)
