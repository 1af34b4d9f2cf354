"""Reading the two sides of a comparison: recipes, plans, receipts and run directories, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import PLAN_FORMAT, Device, build_plan, plan_digest
from megacpp_stp.plan.facts import Side, value_at
from megacpp_stp.recipe import find_recipe, list_recipes, load_recipe
from megacpp_stp.runs.files import PLAN, read_json, shown
from megacpp_stp.runs.receipt import require_readable

_Types = type | tuple[type, ...]
_PLAN_PARTS: dict[str, _Types] = {
    "digest": str,
    "recipe": dict,
    "device": str,
    "layout": dict,
    "patches": list,
    "env": dict,
    "argv": list,
}
_RECEIPT_PARTS: dict[str, _Types] = {"plan_digest": str, "recipe": dict, "pattern": dict, "topology": dict}
_ASK_AGAIN = "plan again with `megacpp-stp plan RECIPE --format json`"


def read_sides(a: str, b: str, *, device: Device | None) -> tuple[Side, Side]:
    """The two sides of a comparison.

    Args:
        a: A recipe's name or .yaml, a plan.json, a receipt.json or a run directory.
        b: Likewise.
        device: What recipes are planned for; None takes the other side's device, or cuda.

    Raises:
        UserError: A side that cannot be read, is damaged, or was edited.
    """
    paths = {name: _recipe_or_path(name) for name in (a, b)}
    read = {name: read_side(name, path) for name, path in paths.items() if path is not None}
    if device is not None and all(name in read for name in (a, b)):
        raise UserError(
            "says what a recipe is planned for, and neither side is a recipe",
            field="--device",
            value=device,
            fix="leave it out",
        )
    if len(read) < len(paths):
        chosen: Device = "cuda"
        if device is not None:
            chosen = device
        elif read:
            chosen = _device_of(next(iter(read.values())))
        read.update({name: _plan_side(name, chosen) for name in paths if name not in read})
    return read[a], read[b]


def _recipe_or_path(name: str) -> Path | None:
    """None for a recipe, else the JSON file to read."""
    if name in list_recipes():
        return None
    path = Path(name)
    try:
        path.stat()
    except OSError as error:
        if "/" not in name and path.suffix not in (".json", ".yaml", ".yml"):
            find_recipe(name)  # raises, with the name that was meant
        raise UserError(f"cannot be read: {error.strerror}", field=shown(name), fix="check the path") from None
    if path.is_dir():
        return path / PLAN
    return None if path.suffix in (".yaml", ".yml") else path


def _plan_side(name: str, device: Device) -> Side:
    plan = build_plan(load_recipe(name), device=device).as_dict()
    return Side(given=name, kind="recipe", digest=plan["digest"], plan=plan)


def _device_of(side: Side) -> Device:
    found = value_at(side.plan, ["device"]) or value_at(side.receipt, ["substrate", "hardware", "device"])
    if found not in ("cpu", "cuda"):
        raise UserError(
            "names no device that a recipe could be planned for", field=shown(side.given), fix="use --device"
        )
    return "cpu" if found == "cpu" else "cuda"


def read_side(given: str, path: Path) -> Side:
    """One side from a plan.json, or from a receipt.json with the plan that it is of beside it.

    Args:
        given: What the user named.
        path: The file.

    Raises:
        UserError: It cannot be read, is damaged, or was edited.
    """
    document = read_json(path)
    if "plan_format" in document:
        return check_plan(document, given=given, path=path)
    if "receipt_version" not in document:
        raise UserError(
            "is neither a plan nor a receipt",
            field=shown(path),
            fix="name a recipe, a plan.json, a receipt.json or a run directory",
        )
    require_readable(document, path)
    _check_parts(document, _RECEIPT_PARTS, path=path, what="receipt", fix="use another run")
    digest = document["plan_digest"]
    return Side(given=given, kind="receipt", digest=digest, plan=_plan_beside(path, digest), receipt=document)


def _plan_beside(path: Path, digest: str) -> Mapping[str, Any] | None:
    """The plan that a receipt is of, when it lies in the same directory."""
    beside = path.with_name(PLAN)
    if not beside.is_file():
        return None
    document = read_json(beside)
    if document.get("digest") != digest:
        return None
    return check_plan(document, given=str(beside), path=beside).plan


def check_plan(document: Mapping[str, Any], *, given: str, path: Path) -> Side:
    """A plan as one side of a comparison, checked for what readers use.

    Args:
        document: From `read_json`.
        given: What the user named.
        path: Of the file.

    Raises:
        UserError: It is damaged, was edited, or is of another format.
    """
    version = document.get("plan_format")
    if version != PLAN_FORMAT:
        raise UserError(
            f"is a plan of another format than {PLAN_FORMAT}", field=shown(path), value=version, fix=_ASK_AGAIN
        )
    _check_parts(document, _PLAN_PARTS, path=path, what="plan", fix=_ASK_AGAIN)
    layers = document["layout"].get("layers")
    if not isinstance(layers, list) or not all(isinstance(token, str) for token in document["argv"]):
        raise UserError("is not a whole plan: layout or argv is damaged", field=shown(path), fix=_ASK_AGAIN)
    if plan_digest(document) != document["digest"]:
        raise UserError("does not match its own digest: it was edited", field=shown(path), fix=_ASK_AGAIN)
    return Side(given=given, kind="plan", digest=document["digest"], plan=document)


def _check_parts(document: Mapping[str, Any], parts: Mapping[str, _Types], *, path: Path, what: str, fix: str) -> None:
    for name, kind in parts.items():
        if not isinstance(document.get(name), kind):
            raise UserError(f"is not a whole {what}: {name} is missing or damaged", field=shown(path), fix=fix)
