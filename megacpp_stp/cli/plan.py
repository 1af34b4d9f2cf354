"""``list`` and ``plan``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from megacpp_stp.cli.options import Device, DeviceOption, Form, FormOption, RecipeArgument, SetOption, print_json
from megacpp_stp.plan import build_plan
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
) -> None:
    """Show what a recipe launches: layout, environment, arguments. Launches nothing and needs no torch."""
    plan = build_plan(load_recipe(recipe, set_ or ()), device=device.value)
    if format is PlanFormat.ARGV:
        print("\n".join(plan.argv))
    elif format is PlanFormat.JSON:
        print_json(plan.as_dict())
    else:
        from megacpp_stp.plan.render import print_plan, shell_line

        if format is PlanFormat.SHELL:
            print(shell_line(plan))
            return
        from rich.console import Console

        print_plan(plan, Console(highlight=False, soft_wrap=True))
