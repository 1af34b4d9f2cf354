"""``list`` and ``plan``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

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
from megacpp_stp.plan import RunPlan, build_plan
from megacpp_stp.recipe import list_recipes, load_recipe


class PlanFormat(StrEnum):
    """Forms of a plan."""

    TABLE = "table"
    ARGV = "argv"
    SHELL = "shell"
    JSON = "json"


def list_command(
    format: FormOption = Form.TABLE,
) -> None:
    """List the recipes."""
    recipes = [load_recipe(name) for name in list_recipes()]
    if format is Form.JSON:
        print_json(
            [{"name": recipe.name, "title": recipe.title, "provenance": recipe.provenance} for recipe in recipes]
        )
        return
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        print(f"{recipe.name:{width}}  {recipe.title}")


def plan_command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    device: DeviceOption = Device.CUDA,
    format: Annotated[PlanFormat, typer.Option("--format", help="argv is one argument a line.")] = PlanFormat.TABLE,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only the arguments, each with the recipe field that asked for it.")
    ] = False,
) -> None:
    """Show what a recipe launches: layout, environment, arguments. Launches nothing and needs no torch."""
    plan = build_plan(load_recipe(recipe, set_ or ()), device=device.value)
    if explain:
        _print_explained(plan, format)
    elif format is PlanFormat.ARGV:
        print("\n".join(plan.argv))
    elif format is PlanFormat.JSON:
        print_json(plan.as_dict())
    else:
        from megacpp_stp.plan.render import print_plan, shell_line

        if format is PlanFormat.SHELL:
            print(shell_line(plan))
            return
        print_plan(plan, console())


def _print_explained(plan: RunPlan, format: PlanFormat) -> None:
    if format is PlanFormat.JSON:
        print_json([{"tokens": list(argument.tokens), "field": argument.field} for argument in plan.arguments])
    elif format is PlanFormat.TABLE:
        from megacpp_stp.plan.render import explain

        print("\n".join(explain(plan)))
    else:
        raise UserError(
            "would no longer be what a process or a shell takes",
            field="--explain",
            value=f"--format {format.value}",
            fix="use --format table or json",
        )
