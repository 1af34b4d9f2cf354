"""``doctor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.options import Device, DeviceOption, Form, FormOption, SetOption, console, print_json
from megacpp_stp.errors import UserError
from megacpp_stp.plan import RunPlan, build_plan
from megacpp_stp.recipe import load_recipe

if TYPE_CHECKING:
    from megacpp_stp.preflight.abilities import Ability
    from megacpp_stp.preflight.finding import Finding

DOCTOR_FORMAT = 1
_MARKS = {"fine": ("", ""), "warning": ("warning", "yellow"), "refused": ("refused", "red")}


def doctor_command(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe's name, or a .yaml file; none to judge the machine alone."),
    ] = None,
    set_: SetOption = None,
    device: DeviceOption = Device.CUDA,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run would write, or a run to go on with; default runs.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="A port for the rendezvous.")] = None,
    format: FormOption = Form.TABLE,
) -> None:
    """Show what this machine has and what that rules out; with a recipe, whether it can run here. Changes nothing.

    Exit status 1: something that the recipe needs is ruled out.
    """
    from megacpp_stp.preflight.abilities import abilities
    from megacpp_stp.preflight.case import Case
    from megacpp_stp.preflight.finding import Verdict, asked
    from megacpp_stp.preflight.machine import look
    from megacpp_stp.training.preflight import check_port, checks

    _check_options(recipe, set_, run_dir)
    plan = build_plan(load_recipe(recipe, set_ or ()), device=device.value) if recipe is not None else None
    machine = look(ask_torch=True)
    # Beside a recipe without a directory, the one in which `launch` would make its own.
    place = run_dir or (Path("runs") if plan is not None else None)
    case = Case(machine=machine, plan=plan, run_dir=place, from_iteration=_checkpoint(run_dir))
    findings = [finding for check in checks(case) for finding in check(case)]
    if port is not None:
        findings.append(asked("port", lambda: check_port(port), good=f"{port} is free"))
    if plan is not None and run_dir is not None and os.path.exists(run_dir):  # not where nobody may look
        findings.append(asked("continuation", lambda: _continuation(run_dir, plan)))
    able = abilities(machine) if plan is None else ()
    ruled_out = any(finding.verdict is Verdict.REFUSED for finding in findings)
    if format is Form.JSON:
        print_json(_as_dict(plan, findings, able, ruled_out=ruled_out))
    else:
        _print_tables(plan, findings, able, ruled_out=ruled_out)
    raise typer.Exit(1 if ruled_out else 0)


def _check_options(recipe: str | None, set_: Sequence[str] | None, run_dir: Path | None) -> None:
    for option, given in (("--set", set_), ("--run-dir", run_dir)):
        if recipe is None and given:
            raise UserError("is about a recipe", field=option, fix="name the recipe, or leave it out")


def _checkpoint(run_dir: Path | None) -> int | None:
    """Iteration of the newest checkpoint in a run directory that is there."""
    from megacpp_stp.runs.checkpoints import latest_checkpoint

    return latest_checkpoint(run_dir) if run_dir is not None and os.path.isdir(run_dir) else None


def _continuation(run_dir: Path, plan: RunPlan) -> str:
    from megacpp_stp.runs.attempts import find_continuation

    start = find_continuation(run_dir, plan.as_dict(), may_change=False)
    if start is None:
        return "the run is complete: nothing to do"
    return f"--resume goes on from iteration {start}" if start else "--resume begins anew: no checkpoint yet"


def _as_dict(
    plan: RunPlan | None, findings: Sequence[Finding], able: Sequence[Ability], *, ruled_out: bool
) -> dict[str, Any]:
    return {
        "doctor_format": DOCTOR_FORMAT,
        "recipe": plan.recipe.name if plan is not None else None,
        "device": plan.device if plan is not None else None,
        "digest": plan.digest if plan is not None else None,
        "ruled_out": ruled_out,
        "findings": [finding.as_dict() for finding in findings],
        "abilities": [ability.as_dict() for ability in able],
    }


def _print_tables(
    plan: RunPlan | None, findings: Sequence[Finding], able: Sequence[Ability], *, ruled_out: bool
) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        note = f"  ({finding.why})" if not mark and finding.why else ""
        table.add_row(Text(mark, style=style), Text(finding.name), Text(finding.found + note))
    out.print(table)
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        if mark:
            out.print(Text(f"\n{mark}: {finding.text}", style=style))
            out.print(Text(f"  fix: {finding.fix}"))
    if able:
        enables = Table(
            title="\nwhat this machine can do", title_justify="left", box=None, pad_edge=False, show_header=False
        )
        for ability in able:
            yes = not ability.missing
            lacks = "" if yes else f"missing: {', '.join(ability.missing)}"
            enables.add_row(
                Text("yes" if yes else "no", style="green" if yes else "red"), Text(ability.name), Text(lacks)
            )
        out.print(enables)
    if plan is not None:
        verdict = "cannot be launched here" if ruled_out else "can be launched here"
        out.print(f"\n{plan.recipe.name} on {plan.device}: {verdict}", markup=False)
