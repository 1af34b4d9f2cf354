"""From a name or a path to a `Recipe`."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.base import KEY, base_of, overlay
from megacpp_stp.recipe.pattern import PatternError, parse_pattern
from megacpp_stp.recipe.schema import Recipe
from megacpp_stp.recipe.yaml_loader import parse_yaml, read_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
# pydantic puts the chosen block into the location, and the types that it tried.
_BLOCK_TAGS = ("mla", "attention", "mamba3", "mamba2", "m2rnn", "stand-in")
_TRIED = ("tuple[", "literal[")
_NAMES_ARE_FREE = (["megatron"], ["launch", "environment"])
_MOST_FINDINGS = 8


def recipe_directory() -> Path:
    """Where the shipped recipes are: inside the wheel, or beside the package in a checkout."""
    packed = _PACKAGE / "_recipes"
    return packed if packed.is_dir() else _PACKAGE.parent / "recipes"


def list_recipes() -> dict[str, Path]:
    """The shipped recipes by name, sorted."""
    return {path.stem: path for path in sorted(recipe_directory().glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe given by name (``nam56r-tiny``) or by path (anything with a slash or ``.yaml``).

    Raises:
        UserError: No such recipe.
    """
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        try:
            found = path.is_file()
        except (OSError, ValueError):  # a name longer than any file's, or with a NUL in it
            found = False
        if not found:
            raise UserError("no such recipe file", field="RECIPE", value=name_or_path, fix="check the path")
        return path
    known = list_recipes()
    if name_or_path in known:
        return known[name_or_path]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        "unknown recipe",
        field="RECIPE",
        value=name_or_path,
        fix=f"{hint}known recipes: {', '.join(known) or 'none'}; or give a path to a .yaml file",
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load, override and validate one recipe.

    Args:
        name_or_path: A shipped recipe's name, or a file.
        overrides: ``path=value`` each, as ``stp.weight=0.05``; the value is read as YAML. A path must name a key
            that the recipe has.

    Raises:
        UserError: Anything wrong with the file, an override or a value; the message names the field and the fix.
    """
    path = find_recipe(name_or_path)
    data = _read(path)
    if (base := base_of(data, file=path)) is not None:
        try:
            below = _read(find_recipe(base))
        except UserError as error:
            raise UserError(error.problem, field=f"{path.name}: {KEY}", value=data[KEY], fix=error.fix) from None
        if KEY in below:
            raise UserError(
                "has a base of its own, and only one step is allowed",
                field=f"{path.name}: {KEY}",
                value=data[KEY],
                fix="name a complete recipe",
            )
        data = overlay(below, data)
    for override in overrides:
        _apply_override(data, override)
    recipe = _validate({**data, "overrides": list(overrides)}, source=path.name)
    _check_families(recipe)
    return recipe


def restore_recipe(stored: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a plan holds.

    Args:
        stored: The ``recipe`` of a plan as plain data.
        overrides: As for `load_recipe`; they come after those that the recipe has been resolved with.

    Raises:
        UserError: It is no recipe of this version, or an override is wrong.
    """
    data = copy.deepcopy(dict(stored))
    earlier = data.pop("overrides", [])
    for override in overrides:
        _apply_override(data, override)
    recipe = _validate({**data, "overrides": [*earlier, *overrides]}, source="plan.json")
    _check_families(recipe)
    return recipe


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError("is not a mapping of keys to values", field=str(path), fix="start from a shipped recipe")
    if "overrides" in data:
        raise UserError("is not a key of a recipe file", field="overrides", fix="use --set on the command line")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise UserError("is not path=value", field="--set", value=override, fix="write e.g. --set stp.weight=0.05")
    value = parse_yaml(text, name=f"--set {path}")
    node: Any = data
    for depth, key in enumerate(keys):
        may_be_new = keys[:-1] in _NAMES_ARE_FREE and depth == len(keys) - 1
        if not isinstance(node, dict) or (key not in node and not may_be_new):
            known = sorted(node) if isinstance(node, dict) else []
            close = difflib.get_close_matches(key, known, n=1)
            there = ".".join(keys[:depth]) or "the recipe"
            raise UserError(
                f"{there} has no key {key!r}",
                field=f"--set {path}",
                fix=f"did you mean {close[0]}?" if close else f"keys there: {', '.join(known) or 'none'}",
            )
        if depth == len(keys) - 1:
            node[key] = value
        else:
            node = node[key]


def _validate(data: dict[str, Any], *, source: str) -> Recipe:
    try:
        # JSON mode: strict types, while a YAML list may still become a tuple.
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _explain(error, source=source) from None


def _explain(error: ValidationError, *, source: str) -> UserError:
    """All findings of pydantic in the reader's words, the first one as the error's field."""
    # A misspelt key shows as one unknown and one missing key: the unknown one is what the user wrote.
    items = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    findings: list[tuple[str, str, str]] = []
    for item in items:
        where = _where(item["loc"])
        if any(earlier == where or earlier.startswith(f"{where}.") for earlier, _, _ in findings):
            continue  # another of the types that a key can have
        problem, fix = _finding(item, where)
        findings.append((where, problem, fix))
    where, problem, fix = findings[0]
    more = "".join(f"\n  also: {w}: {p}" for w, p, _ in findings[1:_MOST_FINDINGS])
    if len(findings) > _MOST_FINDINGS:
        more += f"\n  and {len(findings) - _MOST_FINDINGS} more"
    return UserError(problem, field=f"{source}: {where}", fix=f"{fix or 'correct the value'}{more}")


def _where(location: tuple[Any, ...]) -> str:
    """The path as ``--set`` writes it."""
    # Below these are no keys, only the types that pydantic tried.
    if location[:1] == ("megatron",):
        location = location[:2]
    if location[:2] == ("launch", "environment"):
        location = location[:3]
    if location[:2] == ("stp", "taps"):
        location = location[:3]
    return ".".join(
        str(part)
        for part in location
        if part not in _BLOCK_TAGS and not (isinstance(part, str) and part.startswith(_TRIED))
    )


def _finding(item: Any, where: str) -> tuple[str, str]:
    kind, value = item["type"], item.get("input")
    shown = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    if kind == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        if not close and (elsewhere := _blocks_with(str(item["loc"][-1]))):
            return "is no key of this block", f"it belongs to {elsewhere}; remove it here"
        return "unknown key", f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    if kind == "missing":
        return "is missing", f"add {where}: a recipe is complete, nothing has a hidden default"
    if kind == "union_tag_not_found":
        return "has no 'block'", "say which block it is"
    if where.startswith("launch.environment."):
        return f"is no environment variable (got {shown})", "write NAME: a text, a whole number, or null"
    if item["loc"][-1:] == ("[key]",):
        return "is no option of Megatron", "use its name without the dashes in front, as log-throughput"
    if where.startswith("megatron."):
        return f"is no value of an option (got {shown})", "use text, a number, a list of those, or true for no value"
    if where.startswith("stp.taps"):
        what = "is no list of places" if where == "stp.taps" else "is no place"
        return f"{what} (got {shown})", "list layer numbers from 1, final, final-norm or {family: A, last: 3}"
    if where == "parallel.stages":
        return f"is no list of numbers (got {shown})", "write the number of blocks of each stage, or auto"
    problem = f"{item['msg'][0].lower()}{item['msg'][1:]} (got {shown})"
    if isinstance(value, str) and kind in ("int_type", "float_type") and _is_number(value):
        return problem, "write a plain number, without quotes"
    return problem, ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `location`, found through the schema."""
    schema = _schema()
    node: Any = schema
    for part in location:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        if "properties" in node and part in node["properties"]:
            node = node["properties"][part]
        for option in node.get("anyOf", ()):  # optional sections
            if "$ref" in option or "oneOf" in option:
                node = option
        if "oneOf" in node and "discriminator" in node and part in node["discriminator"]["mapping"]:
            node = {"$ref": node["discriminator"]["mapping"][part]}
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return sorted(key for key in node.get("properties", {}) if key != "overrides")


def _blocks_with(key: str) -> str:
    """The families and blocks that have a key, in words; empty when none does."""
    found = []
    sections = _schema()["$defs"]
    for family, node in sections["Families"]["properties"].items():
        for section in _sections(node):
            definition = sections[section]["properties"]
            if key in definition:
                found.append(f"family {family} with block {definition['block']['const']}")
    return " and ".join(found)


def _sections(node: Any) -> Iterator[str]:
    """Names of the sections that a key of the schema can hold."""
    if "$ref" in node:
        yield node["$ref"].rsplit("/", 1)[1]
    for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _sections(option)


def _check_families(recipe: Recipe) -> None:
    """The pattern is valid, and the families described are exactly those that it has."""
    pattern = parse_pattern(recipe.model.pattern, depth=recipe.model.depth)
    for family, count in pattern.counts.items():
        described = getattr(recipe.model.families, family) is not None
        field = f"model.families.{family}"
        if count and not described:
            raise PatternError(
                f"the pattern has {count} {family} blocks, but what they are is not said",
                pattern=recipe.model.pattern,
                position=recipe.model.pattern.index(family),
                field=field,
                fix=f"describe family {family}",
            )
        if described and not count:
            raise UserError(
                f"is described, but the pattern {recipe.model.pattern!r} has no {family}",
                field=field,
                fix="remove the section, or put the letter into the pattern",
            )
