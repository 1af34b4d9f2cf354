"""``launch``."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from megacpp_stp.cli.options import RecipeArgument, SetOption, console
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import Recipe, load_recipe


def launch_command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda when each process has a GPU.")] = "cuda",
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this node; must be the recipe's.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Nodes; must be the recipe's.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; default runs/RECIPE-TIME.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the rendezvous; default: a free one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and touch nothing.")] = False,
) -> None:
    """Launch a recipe on this node, under torchrun."""
    from megacpp_stp.plan.render import print_plan
    from megacpp_stp.runs.files import RECEIPT
    from megacpp_stp.runs.summary import print_summary
    from megacpp_stp.training.launcher import Launch, resolve_device

    loaded = load_recipe(recipe, set_ or ())
    _check_world(loaded, nproc=nproc, nnodes=nnodes)
    chosen, why = resolve_device(device, processes=loaded.launch.processes_per_node)
    plan = build_plan(loaded, device=chosen)
    directory = run_dir or Path("runs") / f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    launch = Launch(plan=plan, run_dir=directory, port=port)
    out = console()
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
