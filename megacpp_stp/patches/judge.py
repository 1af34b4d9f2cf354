"""Whether a surface still fits a megatron-core, decided from files alone: no torch, nothing of megatron imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megacpp_stp.patches.fingerprint import definitions, fingerprint
from megacpp_stp.patches.ledger import Condition, Entry, InDefinition
from megacpp_stp.patches.upstream import Core
from megacpp_stp.patches.uses import lost_consumers, undeclared_uses


class State(StrEnum):
    """How far a surface has come; each state includes those before it, up to `ACTIVE`.

    Attributes:
        DECLARED: The ledger has it.
        ELIGIBLE: The plan lists it, and its predicate says that this plan needs it.
        FINGERPRINT_OK: Upstream is as it was when a person reviewed it, or the user allowed that it is not.
        APPLIED: The replacement is in place.
        REACHED: Each consumer finds it through its own globals, and its probe has called it there.
        ACTIVE: Its probe has shown that it does what it is for.
        REFUSED: It cannot be used, for the reason given.
        RETIRED: Upstream has made it superfluous.
    """

    DECLARED = "declared"
    ELIGIBLE = "eligible"
    FINGERPRINT_OK = "fingerprint ok"
    APPLIED = "applied"
    REACHED = "reached"
    ACTIVE = "active"
    REFUSED = "refused"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the files say of one surface.

    Attributes:
        id: Of the surface.
        state: `FINGERPRINT_OK`, `REFUSED` or `RETIRED`.
        reason: Of the last two.
        core_version: Of the megatron-core judged.
        reviewed_at: The reviewed version that upstream is equal to, as far as the surface is concerned.
        found: Fingerprint of everything that the entry watches; None for what is not there.
        changed: What differs from the review nearest to this version.
        can_be_allowed: Whether that is all that is wrong, so that ``--allow-unreviewed`` can allow it.
    """

    id: str
    state: State
    core_version: str
    reason: str | None = None
    reviewed_at: str | None = None
    found: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    changed: tuple[str, ...] = ()
    can_be_allowed: bool = False


def judge(entry: Entry, core: Core) -> Verdict:
    """Judge one surface against one megatron-core."""
    found = {name: fingerprint(core, name) for name in entry.watched}
    retired = next((said for condition in entry.retire.when if (said := _holds(condition, core))), None)
    if retired is not None:
        reason = f"delete me: {retired}; {entry.retire.says}"
        return Verdict(id=entry.id, state=State.RETIRED, reason=reason, core_version=core.version, found=found)
    objections = list(_objections(entry, core, found))
    can_be_allowed = not objections
    reviewed_at = next((at for at, hashes in entry.reviewed.items() if hashes == found), None)
    changed: tuple[str, ...] = ()
    if reviewed_at is None:
        nearest = _nearest(entry, core.version)
        reviewed = entry.reviewed.get(nearest, {})
        changed = tuple(name for name in entry.watched if found[name] != reviewed.get(name))
        objections.append(f"not as reviewed in {nearest or 'any version'}: {', '.join(changed)}")
    return Verdict(
        id=entry.id,
        state=State.REFUSED if objections else State.FINGERPRINT_OK,
        reason="; ".join(objections) or None,
        core_version=core.version,
        reviewed_at=reviewed_at,
        found=found,
        changed=changed,
        can_be_allowed=can_be_allowed and bool(changed),
    )


def _objections(entry: Entry, core: Core, found: Mapping[str, str | None]) -> Iterator[str]:
    """What no review of bodies can allow."""
    if not entry.range.contains(core.version, prereleases=True):
        yield f"it is for megatron-core {entry.range_text}, and this is {core.version}"
    if gone := [name for name, value in found.items() if value is None]:
        yield f"not there any more: {', '.join(gone)}"
    for replaced in entry.replaces:
        if lost := lost_consumers(core, replaced):
            yield f"{', '.join(lost)} does not use {replaced.name} the way the entry says"
        if others := [use.where for use in undeclared_uses(core, replaced)]:
            yield f"{replaced.name} is also used or bound where the entry does not say: {', '.join(others)}"


def _nearest(entry: Entry, version: str) -> str:
    """The newest review that is not of a later version, else the oldest; "" without any."""
    reviews = sorted(entry.reviewed, key=Version)
    return next((at for at in reversed(reviews) if Version(at) <= Version(version)), reviews[0] if reviews else "")


def _holds(condition: Condition, core: Core) -> str | None:
    """What holds, in words; None when it does not."""
    if condition.version is not None and SpecifierSet(condition.version).contains(core.version, prereleases=True):
        return f"megatron-core {core.version} is {condition.version}"
    if condition.defines is not None and definitions(core, condition.defines):
        return f"there is {condition.defines}"
    if condition.ships is not None and core.ships(condition.ships):
        return f"the wheel brings {condition.ships}"
    if condition.mentions is not None and _mentions(condition.mentions, core):
        return f"{condition.mentions.of} mentions {condition.mentions.name}"
    if condition.accepts is not None and _accepts(condition.accepts, core):
        return f"{condition.accepts.of} has a parameter {condition.accepts.name}"
    return None


def _mentions(wanted: InDefinition, core: Core) -> bool:
    for definition in definitions(core, wanted.of):
        docstrings = {id(text) for node in ast.walk(definition) if (text := _docstring(node)) is not None}
        for node in ast.walk(definition):
            for word in ("id", "attr", "arg", "name"):
                if getattr(node, word, None) == wanted.name:
                    return True
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in docstrings and wanted.name in node.value:  # type: ignore[attr-defined]
                return True
    return False


def _docstring(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and isinstance(node.body[0], ast.Expr):
        return node.body[0].value
    return None


def _accepts(wanted: InDefinition, core: Core) -> bool:
    for definition in definitions(core, wanted.of):
        if isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = definition.args
            if wanted.name in (a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)):
                return True
    return False
