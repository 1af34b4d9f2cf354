"""Options that several commands share."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_A_PIPE = 160  # where nothing wraps: names in tables must not be cut off


class Device(StrEnum):
    """Devices that a plan can be for."""

    CPU = "cpu"
    CUDA = "cuda"


class Form(StrEnum):
    """Forms of an answer."""

    TABLE = "table"
    JSON = "json"


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .yaml file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one recipe field; may be repeated."),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="What the ranks run on.")]
FormOption = Annotated[Form, typer.Option("--format", help="json goes alone to stdout.")]


def print_json(content: Any) -> None:
    """JSON alone on stdout, with stable bytes."""
    print(json.dumps(content, indent=2, sort_keys=True, allow_nan=False))


def console() -> Console:
    """Where tables for people go: as wide as the terminal, and wide enough for whole names in a file or a pipe."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
