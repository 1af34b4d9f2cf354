"""``launch``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import SetOption, console
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import Recipe, load_recipe, restore_recipe

_AllowUnreviewed = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="Let a patch meet upstream code that nobody reviewed; may be repeated."),
]


def launch_command(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe's name, or a .yaml file; with --resume default the run's own."),
    ] = None,
    set_: SetOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or auto: cuda when each process has a GPU. Default cuda; to go on, the run's."),
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this node; must be the recipe's.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Nodes; must be the recipe's.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; default runs/RECIPE-TIME.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the rendezvous; default: a free one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")] = False,
    allow_plan_change: Annotated[
        bool, typer.Option("--allow-plan-change", help="With --resume: take new values for what may change.")
    ] = False,
    allow_unreviewed: _AllowUnreviewed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and touch nothing.")] = False,
) -> None:
    """Launch a recipe on this node, under torchrun, or go on with a run that was stopped."""
    from megacpp_stp.plan.render import print_plan
    from megacpp_stp.runs.attempts import find_continuation
    from megacpp_stp.runs.files import RECEIPT
    from megacpp_stp.runs.summary import print_summary
    from megacpp_stp.training.launcher import Launch
    from megacpp_stp.training.preflight import resolve_device

    _check_resume(recipe, run_dir, resume=resume, allow_plan_change=allow_plan_change)
    loaded, planned_device = _wanted(recipe, set_ or (), run_dir if resume else None)
    _check_world(loaded, nproc=nproc, nnodes=nnodes)
    chosen, why = resolve_device(device or planned_device, processes=loaded.launch.processes_per_node)
    plan = build_plan(loaded, device=chosen)
    directory = run_dir or Path("runs") / f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    out = console()
    start = None
    if resume:
        start = find_continuation(directory, plan.as_dict(), may_change=allow_plan_change)
        if start is None:
            out.print(f"the run in {directory} is complete: nothing to do", markup=False)
            return
        out.print(f"goes on from iteration {start}" if start else "no checkpoint yet: begins anew", markup=False)
    allowed = tuple(dict.fromkeys(allow_unreviewed or ()))
    launch = Launch(plan=plan, run_dir=directory, port=port, from_iteration=start, allow_unreviewed=allowed)
    if dry_run:
        print_plan(plan, out)
        out.print(f"run directory: {directory}", markup=False)
        out.print(launch.shell(), markup=False)
        return
    launch.preflight()
    out.print(f"device: {chosen} ({why}); run directory: {directory}", markup=False)
    status = launch.run()
    if (directory / RECEIPT).exists():
        print_summary(directory, out)
    if status:
        print(f"megacpp-stp: the run ended with status {status}; its directory is {directory}", file=sys.stderr)
    raise typer.Exit(status)


def _check_resume(recipe: str | None, run_dir: Path | None, *, resume: bool, allow_plan_change: bool) -> None:
    if resume and run_dir is None:
        raise UserError("is needed with --resume", field="--run-dir", fix="name the directory of the run to go on with")
    if not resume and recipe is None:
        raise UserError("is needed", field="RECIPE", fix="name one of `megacpp-stp list`, or a .yaml file")
    if allow_plan_change and not resume:
        raise UserError("is for --resume", field="--allow-plan-change", fix="leave it out")


def _wanted(recipe: str | None, overrides: Sequence[str], run_dir: Path | None) -> tuple[Recipe, str]:
    """What to run, and on which device unless another is asked for."""
    from megacpp_stp.runs.attempts import read_run_plan

    planned = read_run_plan(run_dir) if run_dir is not None else None
    device = planned["device"] if planned else "cuda"
    if recipe is not None:
        return load_recipe(recipe, overrides), device
    assert planned is not None
    return restore_recipe(planned["recipe"], overrides), device


def _check_world(recipe: Recipe, *, nproc: int | None, nnodes: int | None) -> None:
    for option, given, field in (("--nproc", nproc, "processes_per_node"), ("--nnodes", nnodes, "nodes")):
        planned = getattr(recipe.launch, field)
        if given is not None and given != planned:
            raise UserError(
                f"does not fit the plan, which has launch.{field} {planned}",
                field=option,
                value=given,
                fix=f"--set launch.{field}={given}, with parallel sizes that fit it, or leave {option} out",
            )
