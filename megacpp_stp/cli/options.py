"""Options that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .yaml file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one recipe field; may be repeated."),
]


def print_json(content: Any) -> None:
    """JSON alone on stdout, with stable bytes."""
    print(json.dumps(content, indent=2, sort_keys=True, allow_nan=False))
