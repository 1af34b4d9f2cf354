"""``patches``: what is replaced upstream at run time, and whether it still fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.options import Form, FormOption, console, print_json
from megacpp_stp.patches.ledger import Entry, find_entry, load_ledger

if TYPE_CHECKING:
    from megacpp_stp.patches.judge import Verdict

app = typer.Typer(no_args_is_help=True, help="What is replaced upstream at run time, and whether it still fits.")


@app.command("list")
def list_command(format: FormOption = Form.TABLE) -> None:
    """Show all patch surfaces."""
    ledger = load_ledger()
    if format is Form.JSON:
        print_json([_summary(entry) for entry in ledger.values()])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("id", "what it does", "needed by"):
        table.add_column(column)
    for entry in ledger.values():
        table.add_row(Text(entry.id), Text(entry.title), Text(entry.needed_by))
    console().print(table)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(metavar="ID", help="A patch surface.")],
    format: FormOption = Form.TABLE,
) -> None:
    """Show the ledger entry of one patch surface."""
    entry = find_entry(load_ledger(), name, field="ID")
    content = entry.model_dump(mode="json", exclude_unset=True)
    if format is Form.JSON:
        print_json({**content, "range": entry.range_text})
        return
    import yaml

    print(yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True), end="")


@app.command("check")
def check_command(
    core: Annotated[
        Path | None,
        typer.Option(
            "--core", metavar="DIR", help="A folder with megatron/core in it, or a wheel; default: installed."
        ),
    ] = None,
    format: FormOption = Form.TABLE,
) -> None:
    """Judge every patch surface against a megatron-core, from its files alone. Exit status 1: one does not fit."""
    from megacpp_stp.patches.judge import State, judge
    from megacpp_stp.patches.upstream import open_core

    ledger, files = load_ledger(), open_core(core)
    verdicts = [judge(entry, files) for entry in ledger.values()]
    fits = all(verdict.state is State.FINGERPRINT_OK for verdict in verdicts)
    if format is Form.JSON:
        print_json(
            {"megatron_core": files.version, "fits": fits, "surfaces": [_as_dict(verdict) for verdict in verdicts]}
        )
    else:
        _print_verdicts(files.version, verdicts, ledger)
    raise typer.Exit(0 if fits else 1)


def _summary(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "title": entry.title,
        "needed_by": entry.needed_by,
        "range": entry.range_text,
        "replaces": [replaced.name for replaced in entry.replaces],
        "reviewed": sorted(entry.reviewed),
    }


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.id,
        "state": str(verdict.state),
        "reason": verdict.reason,
        "reviewed_at": verdict.reviewed_at,
        "changed": list(verdict.changed),
        "found": dict(verdict.found),
    }


def _print_verdicts(version: str, verdicts: Sequence[Verdict], ledger: Mapping[str, Entry]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"megatron-core {version}", title_justify="left", box=None, pad_edge=False)
    for column in ("id", "state", ""):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        at = f"as reviewed at {verdict.reviewed_at}"
        table.add_row(Text(verdict.id), Text(verdict.state), Text(verdict.reason or at))
    console().print(table)
    for verdict in verdicts:
        if verdict.changed and None not in verdict.found.values():
            print(f"\nonce somebody has read what changed, this goes under `reviewed` of patches/{verdict.id}.yaml:")
            print(f'  "{version}":')
            for name in ledger[verdict.id].watched:
                print(f"    {name}: {verdict.found[name]}")
