"""``launch``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.node_options import (
    EndpointOption,
    NnodesOption,
    NodeRankOption,
    NodeTimeoutOption,
    RdzvIdOption,
    this_node,
    with_nodes,
)
from megacpp_stp.cli.options import SetOption, console, print_json
from megacpp_stp.errors import UserError
from megacpp_stp.plan import RunPlan, build_plan
from megacpp_stp.recipe import Recipe, load_recipe, restore_recipe

if TYPE_CHECKING:
    from megacpp_stp.training.launcher import Launch
    from megacpp_stp.training.torchrun import Node


class DryRunFormat(StrEnum):
    """Forms of a dry run."""

    TABLE = "table"
    SHELL = "shell"
    JSON = "json"


class ScriptKind(StrEnum):
    """Scripts that start a recipe on several nodes."""

    SLURM = "slurm"
    SHELL = "shell"


_AllowUnreviewed = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="Let a patch meet upstream code that nobody reviewed; may be repeated."),
]
_Format = Annotated[DryRunFormat, typer.Option("--format", help="With --dry-run: shell and json go alone to stdout.")]


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
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; default runs/RECIPE-TIME.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the rendezvous of one node; default: a free one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")] = False,
    allow_plan_change: Annotated[
        bool, typer.Option("--allow-plan-change", help="With --resume: take new values for what may change.")
    ] = False,
    allow_unreviewed: _AllowUnreviewed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and touch nothing.")] = False,
    format: _Format = DryRunFormat.TABLE,
    script: Annotated[
        ScriptKind | None, typer.Option(help="Print a script that starts the recipe on its nodes, and nothing else.")
    ] = None,
    nnodes: NnodesOption = None,
    node_rank: NodeRankOption = None,
    rdzv_endpoint: EndpointOption = None,
    rdzv_id: RdzvIdOption = None,
    node_timeout: NodeTimeoutOption = 600,
) -> None:
    """Launch a recipe on this node, under torchrun, or go on with a run that was stopped."""
    _check_resume(recipe, run_dir, resume=resume, allow_plan_change=allow_plan_change)
    loaded, planned_device = _wanted(recipe, set_ or (), run_dir if resume else None, nnodes=nnodes)
    _check_world(loaded, nproc=nproc)
    of_node: dict[str, object] = {"--node-rank": node_rank, "--rdzv-endpoint": rdzv_endpoint, "--rdzv-id": rdzv_id}
    if format is not DryRunFormat.TABLE and not dry_run:
        raise UserError("is for --dry-run", field="--format", value=format.value, fix="add --dry-run")
    if script is not None:
        lost = {"--dry-run": dry_run, "--resume": resume, "--run-dir": run_dir, "--port": port, **of_node}
        _check_script({**lost, "--allow-unreviewed": allow_unreviewed})
        _print_script(script, loaded, given=recipe, device=device)
        return
    node = this_node(loaded, of_node, port=port, run_dir=run_dir, timeout=node_timeout)
    launch, why = _planned(
        loaded, device or planned_device, node=node, port=port, run_dir=run_dir, allowed=allow_unreviewed or ()
    )
    _run(launch, why, recipe=recipe, resume=resume, may_change=allow_plan_change, dry_run=format if dry_run else None)


def _planned(
    recipe: Recipe,
    device: str,
    *,
    node: Node | None,
    port: int | None,
    run_dir: Path | None,
    allowed: Sequence[str],
) -> tuple[Launch, str]:
    """The launch, and why it is on its device."""
    from megacpp_stp.training.launcher import Launch
    from megacpp_stp.training.preflight import resolve_device

    if run_dir is not None and str(run_dir).startswith("-"):
        fix = "name another, or the whole path"
        raise UserError("would be an option to torchrun", field="--run-dir", value=str(run_dir), fix=fix)
    chosen, why = resolve_device(device, processes=recipe.launch.processes_per_node)
    launch = Launch(
        plan=build_plan(recipe, device=chosen),
        run_dir=run_dir or Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}",
        port=port,
        allow_unreviewed=tuple(dict.fromkeys(allowed)),
        node=node,
    )
    return launch, why


def _run(
    launch: Launch, why: str, *, recipe: str | None, resume: bool, may_change: bool, dry_run: DryRunFormat | None
) -> None:
    from megacpp_stp.runs.files import RECEIPT
    from megacpp_stp.runs.summary import print_summary

    out, aside = console(), sys.stdout if dry_run in (None, DryRunFormat.TABLE) else sys.stderr
    if resume:
        going_on = _going_on(launch, own_plan=recipe is not None, may_change=may_change, dry_run=dry_run is not None)
        if going_on is None:
            print(f"the run in {launch.run_dir} is complete: nothing to do", file=aside)
            return
        launch = going_on
        print("\n".join([_where(launch), *_changes(launch)]), file=aside, flush=True)
    if dry_run is not None:
        launch.rehearse()
        _print_dry_run(launch, dry_run)
        return
    launch.preflight()
    out.print(f"device: {launch.plan.device} ({why}); run directory: {launch.run_dir}", markup=False)
    status = launch.run()
    if launch.rank == 0 and (launch.run_dir / RECEIPT).exists():
        print_summary(launch.run_dir, out)
    if status:
        print(f"megacpp-stp: the run ended with status {status}; its directory is {launch.run_dir}", file=sys.stderr)
    raise typer.Exit(status)


def _going_on(launch: Launch, *, own_plan: bool, may_change: bool, dry_run: bool) -> Launch | None:
    """The launch from where its run stopped; None when that is complete."""
    from dataclasses import replace

    from megacpp_stp.runs.attempts import find_continuation
    from megacpp_stp.runs.nodes import is_on_offer
    from megacpp_stp.training.follower import expected_start

    if launch.rank and not (dry_run and not is_on_offer(launch.run_dir)):  # node 0 has the last word
        start = expected_start(launch)
    else:
        start = find_continuation(launch.run_dir, launch.plan.as_dict(), may_change=may_change)
    return None if start is None else replace(launch, from_iteration=start, own_plan=own_plan)


def _where(launch: Launch) -> str:
    from megacpp_stp.runs.begun import nothing_has_run

    if nothing_has_run(launch.run_dir):
        return f"nothing has run in {launch.run_dir}: begins there from iteration 0"
    start = launch.from_iteration
    return f"goes on from iteration {start}" if start else "no checkpoint yet: begins anew"


def _changes(launch: Launch) -> list[str]:
    """What the run goes on with in place of what its plan says, in lines of their own."""
    from megacpp_stp.plan.changes import changes
    from megacpp_stp.runs.attempts import read_run_plan
    from megacpp_stp.runs.files import PLAN

    if launch.rank or not (launch.run_dir / PLAN).exists():  # node 0 tells, and may be writing it
        return []
    found = changes(read_run_plan(launch.run_dir), launch.plan.as_dict())
    return ["changes the run's plan:", *(f"  {line}" for line in found)] if found else []


def _print_dry_run(launch: Launch, form: DryRunFormat) -> None:
    from megacpp_stp.plan.env_guard import check_environment
    from megacpp_stp.training.dry_run import planned_launch

    facts = planned_launch(launch)
    if form is DryRunFormat.JSON:
        print_json(facts)
    elif form is DryRunFormat.SHELL:
        print(launch.shell())
    else:
        from megacpp_stp.plan.render import print_plan

        out = console()
        print_plan(launch.plan, out)
        out.print(f"run directory: {facts['run_directory']}", markup=False)
        out.print(f"node: {facts['node']} of {facts['nodes']}", markup=False)
        planned = {variable.name for variable in launch.plan.env}
        for variable in launch.variables(launch.start()):
            if variable.name not in planned:
                out.print(f"sets: {variable.name}={shlex.quote(variable.value)}  # {variable.why}", markup=False)
        for path in facts["files"]:
            out.print(f"writes: {path}", markup=False)
        out.print(launch.shell(), markup=False)
    _tell_gaps(launch.plan)
    try:
        check_environment(launch.variables(launch.start()), launch.plan.recipe, os.environ)
    except UserError as error:
        print(f"megacpp-stp: a launch from this shell would be refused: {error}", file=sys.stderr)


def _tell_gaps(plan: RunPlan) -> None:
    """Say that this would be refused on any machine: beside what is printed for another program too."""
    from megacpp_stp.training.preflight import require_runnable

    try:
        require_runnable(plan)
    except UserError as error:
        print(f"megacpp-stp: a launch would be refused: {error}", file=sys.stderr)


def _check_script(given: Mapping[str, object]) -> None:
    """Refuse options that a script does not hold, and that would be lost without a word."""
    for option, value in given.items():
        if value is not None and value is not False:
            fix = "leave it out here; a script hands the options that it is started with on to its launch"
            raise UserError("is not for --script", field=option, fix=fix)


def _print_script(kind: ScriptKind, recipe: Recipe, *, given: str | None, device: str | None) -> None:
    from megacpp_stp.plan.scripts import shell_script, slurm_script

    if given is None:
        raise UserError("is needed for a script", field="RECIPE", fix="name the recipe")
    if device == "auto":
        raise UserError("is found out on a node", field="--device", value=device, fix="name cpu or cuda")
    plan = build_plan(recipe, device="cpu" if device == "cpu" else "cuda")
    write = slurm_script if kind is ScriptKind.SLURM else shell_script
    print(write(plan, recipe=given, overrides=recipe.overrides), end="")
    _tell_gaps(plan)


def _check_resume(recipe: str | None, run_dir: Path | None, *, resume: bool, allow_plan_change: bool) -> None:
    if resume and run_dir is None:
        raise UserError("is needed with --resume", field="--run-dir", fix="name the directory of the run to go on with")
    if not resume and recipe is None:
        raise UserError("is needed", field="RECIPE", fix="name one of `megacpp-stp list`, or a .yaml file")
    if allow_plan_change and not resume:
        raise UserError("is for --resume", field="--allow-plan-change", fix="leave it out")


def _wanted(
    recipe: str | None, overrides: Sequence[str], run_dir: Path | None, *, nnodes: int | None
) -> tuple[Recipe, str]:
    """What to run, and on which device unless another is asked for."""
    planned = _planned_there(run_dir, needed=recipe is None) if run_dir is not None else None
    device = planned["device"] if planned else "cuda"
    if recipe is not None:
        return with_nodes(lambda given: load_recipe(recipe, given), overrides, nnodes), device
    assert planned is not None
    return with_nodes(lambda given: restore_recipe(planned["recipe"], given), overrides, nnodes), device


def _planned_there(run_dir: Path, *, needed: bool) -> dict[str, Any] | None:
    """The plan of the run to go on with; None where nothing has run and there is none yet."""
    from megacpp_stp.runs.attempts import read_run_plan
    from megacpp_stp.runs.begun import nothing_has_run
    from megacpp_stp.runs.files import PLAN

    try:
        os.stat(run_dir)
    except FileNotFoundError:
        pass  # said by whoever reads it
    except OSError as error:
        problem, fix = f"cannot be read: {error.strerror}", "name the run's directory, or mend its permissions"
        raise UserError(problem, field="--run-dir", value=str(run_dir), fix=fix) from None
    if nothing_has_run(run_dir) and not (run_dir / PLAN).exists():
        if needed:
            problem = f"is needed: nothing has run in {run_dir}, and it holds no plan"
            raise UserError(problem, field="RECIPE", fix="name the recipe, with the --set that it was launched with")
        return None
    return read_run_plan(run_dir)


def _check_world(recipe: Recipe, *, nproc: int | None) -> None:
    planned = recipe.launch.processes_per_node
    if nproc is not None and nproc != planned:
        raise UserError(
            f"does not fit the plan, which has launch.processes_per_node {planned}",
            field="--nproc",
            value=nproc,
            fix=f"--set launch.processes_per_node={nproc}, with parallel sizes that fit it, or leave --nproc out",
        )
