"""``base:``, the one form of inheritance: a recipe file that says only what it changes of one complete recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError

KEY = "base"
OWN_KEYS = ("name", "title")
"""What tells two recipes apart, and is never inherited."""


def base_of(data: Mapping[str, Any], *, file: Path) -> str | None:
    """What the file names as its base: a shipped recipe's name, or a path beside the file. None without.

    Raises:
        UserError: Something that is no name, or a file that has no name or title of its own.
    """
    if KEY not in data:
        return None
    named = data[KEY]
    if not isinstance(named, str) or not named:
        raise UserError(
            "must name one recipe",
            field=f"{file.name}: {KEY}",
            value=named,
            fix="write a shipped recipe's name, or the path of a .yaml file relative to this one",
        )
    for key in OWN_KEYS:
        if key not in data:
            raise UserError(
                "is missing", field=f"{file.name}: {key}", fix=f"a recipe with a base has a {key} of its own: add it"
            )
    if "/" in named or named.endswith((".yaml", ".yml")):
        return str(file.parent / named)
    return named


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` on `below`: mappings are merged key by key, everything else is replaced.

    A mapping whose ``block`` differs is replaced as a whole: the keys of one kind of block mean nothing in another.
    """
    merged = dict(below)
    for key, value in above.items():
        if key == KEY:
            continue
        old = below.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_block(old, value):
            merged[key] = overlay(old, value)
        else:
            merged[key] = value
    return merged


def _same_block(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return "block" not in above or above["block"] == below.get("block")
