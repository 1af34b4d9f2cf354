"""``check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.check_build import Build, StandIn
from megacpp_stp.cli.options import (
    Device,
    DeviceOption,
    Form,
    FormOption,
    RecipeArgument,
    SetOption,
    console,
    print_json,
)
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe

if TYPE_CHECKING:
    from megacpp_stp.training.upstream_check import Derived


def check_command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    device: DeviceOption = Device.CUDA,
    build: Annotated[
        bool, typer.Option("--build", help="Build the model as ranks of the recipe's world, without memory or peers.")
    ] = False,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", help="With --build: a rank to build; may be repeated. Else both ends of each stage."),
    ] = None,
    backend: Annotated[
        StandIn | None,
        typer.Option("--backend", help="With --build: in the place of a te recipe's modules, where those are not."),
    ] = None,
    format: FormOption = Form.TABLE,
) -> None:
    """Let Megatron's own parser validate a recipe's arguments, and show what it derives. Needs no GPU."""
    from megacpp_stp.training.preflight import require_train_extra
    from megacpp_stp.training.upstream_check import ask_upstream

    for option, given in (("--rank", rank), ("--backend", backend)):
        if given and not build:
            raise UserError("says how to build", field=option, fix="add --build, or leave it out")
    plan = build_plan(load_recipe(recipe, set_ or ()), device=device.value)
    require_train_extra()
    dry = Build(plan, recipe, set_ or (), ranks=rank or (), backend=backend) if build else None
    derived = ask_upstream(plan)
    contradicted = [row for row in derived if row.option]
    if dry is not None:
        dry.run()
    if format is Form.JSON:
        content: dict[str, Any] = {
            "digest": plan.digest,
            "accepted": not contradicted,
            "derived": [asdict(row) for row in derived],
            "launchable": not plan.gaps,
            "gaps": [asdict(gap) for gap in plan.gaps],
        }
        print_json(content if dry is None else {**content, "build": dry.as_dict()})
    else:
        _print_table(plan.recipe.name, derived)
        for gap in plan.gaps:
            print(f"not launchable by this version: {gap.field}: {gap.what}")
        if dry is not None:
            dry.print()
    if contradicted or (dry is not None and dry.apart):
        raise typer.Exit(1)


def _print_table(name: str, derived: Sequence[Derived]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what Megatron's validation changed or added", title_justify="left", box=None, pad_edge=False)
    for column in ("argument", "before", "after", ""):
        table.add_column(column)
    for row in derived:
        note = f"{row.option} asked for {row.before}" if row.option else ""
        after = row.after or "(removed)"
        table.add_row(Text(row.name), Text(row.before or "(absent)"), Text(after), Text(note, style="red"))
    out = console()
    out.print(table)
    wrong = sum(bool(row.option) for row in derived)
    out.print(f"{name}: megatron-core {'changes what the recipe asked for' if wrong else 'accepts the arguments'}")
