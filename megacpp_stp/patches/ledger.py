"""The ledger: one YAML file a surface in ``patches/``, read into frozen entries. docs/patches.md explains each key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megacpp_stp.errors import UserError
from megacpp_stp.patches.names import NAME, TARGET, THROUGH, Target
from megacpp_stp.patches.upstream import SUPPORTED

_PACKAGE = Path(__file__).resolve().parents[1]
_SUPPORTED = "supported"

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=rf"^{NAME}$")]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader, for which the last of two equal keys wins, with an error instead."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [str(key) for place, key in enumerate(keys) if key in keys[:place]]:
            raise ValueError(f"{', '.join(twice)} is there twice")
        return super().construct_mapping(node, deep)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Consumer(_Part):
    """A function upstream that uses a target.

    Attributes:
        function: Which, as ``module:qualname``.
        through: How it comes by the target: a name in its own globals, dotted or not, or the import statement in its
            body.
        called_on: In a run's first iteration at the latest, it has called the replacement on ``every`` rank, on
            ``some`` rank; ``maybe`` where a run need not come by.
    """

    function: Name
    through: Annotated[str, Field(pattern=rf"^{THROUGH}$")]
    called_on: Literal["every", "some", "maybe"]


class Replaced(_Part):
    """One thing that a surface replaces.

    Attributes:
        name: ``module:qualname``, or ``module:TABLE[key]`` for an entry of a table.
        consumers: All that use it upstream.
        also_bound: Further names of it, as ``module:name``, that no consumer goes through: re-exports.
    """

    name: Annotated[str, Field(pattern=rf"^{TARGET}$")]
    consumers: Annotated[tuple[Consumer, ...], Field(min_length=1)]
    also_bound: tuple[Name, ...] = ()

    @property
    def target(self) -> Target:
        """Its name, read."""
        return Target.parse(self.name)


class InDefinition(_Part):
    """A word in a definition upstream.

    Attributes:
        of: The definition, as ``module:qualname``.
        name: An identifier, an attribute, a parameter or a part of a string in it.
    """

    of: Name
    name: Text


class Condition(_Part):
    """One condition that makes a surface superfluous; exactly one key.

    Attributes:
        version: Megatron-core's version is in this PEP 440 range.
        defines: This definition exists.
        mentions: This definition has this word in it, docstrings and comments left out.
        accepts: This function has a parameter of this name.
        ships: The wheel brings this file.
    """

    version: str | None = None
    defines: Name | None = None
    mentions: InDefinition | None = None
    accepts: InDefinition | None = None
    ships: str | None = None

    @model_validator(mode="after")
    def _has_one_key(self) -> Self:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("a condition has exactly one key")
        if self.version is not None:
            _specifier(self.version)
        return self


class Retirement(_Part):
    """When to delete a surface.

    Attributes:
        when: Any of these.
        says: The same in words, with what no condition here can see.
    """

    when: Annotated[tuple[Condition, ...], Field(min_length=1)]
    says: Text


class Claim(_Part):
    """What a surface achieves.

    Attributes:
        what: With its unit, where it has one.
        measured: How it was measured, and the test or benchmark that measures it again.
    """

    what: Text
    measured: Text


class Entry(_Part):
    """A surface as the ledger declares it.

    Attributes:
        id: Its name in plans, receipts and of its file.
        title: What it does, as one clause.
        code: The module with its `SURFACE`.
        what: What is done instead.
        why_not_by_argument_or_spec: Why no argument, spec, subclass or autograd function does it.
        upstream_reference: Files, functions and reports upstream.
        upstream: ``supported``, or a PEP 440 range within it.
        needed_by: Which plans need it, in words; the code's predicate decides.
        replaces: What it replaces.
        relies_on: Definitions upstream that it does not replace and that it would be wrong without.
        conflicts: Surfaces that cannot be in one plan with it.
        after: Surfaces that are applied before it where a plan has both.
        retire: When to delete it.
        claim: What it achieves.
        reviewed: By version of megatron-core, the fingerprint of everything in `watched` as a person has read it.
    """

    id: Id
    title: Text
    code: Annotated[str, Field(pattern=r"^megacpp_stp(\.\w+)+$")]
    what: Text
    why_not_by_argument_or_spec: Text
    upstream_reference: Text
    upstream: Text
    needed_by: Text
    replaces: Annotated[tuple[Replaced, ...], Field(min_length=1)]
    relies_on: tuple[Name, ...]
    conflicts: tuple[Id, ...]
    after: tuple[Id, ...]
    retire: Retirement
    claim: Claim
    reviewed: dict[str, dict[str, Sha256]]

    @property
    def range(self) -> SpecifierSet:
        """Versions of megatron-core that it is for."""
        return SpecifierSet(self.range_text)

    @property
    def range_text(self) -> str:
        """The same as text, in a fixed order."""
        return SUPPORTED if self.upstream == _SUPPORTED else f"{SUPPORTED},{self.upstream}"

    @property
    def watched(self) -> tuple[str, ...]:
        """Everything upstream whose change needs a review: what it replaces, its consumers, what it relies on."""
        consumers = (consumer.function for replaced in self.replaces for consumer in replaced.consumers)
        return tuple(dict.fromkeys((*(replaced.name for replaced in self.replaces), *consumers, *self.relies_on)))

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.upstream != _SUPPORTED:
            _specifier(self.upstream)
        for version, hashes in self.reviewed.items():
            try:
                Version(version)
            except InvalidVersion:
                raise ValueError(f"reviewed: {version!r} is no version") from None
            if odd := set(hashes) ^ set(self.watched):
                raise ValueError(f"reviewed {version}: one fingerprint for each of {sorted(odd)}, and no other")
        return self


def _specifier(text: str) -> SpecifierSet:
    try:
        return SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError(f"{text!r} is no range of versions") from None


def ledger_directory() -> Path:
    """Where the entries are: inside the wheel, or beside the package in a checkout."""
    packed = _PACKAGE / "_patches"
    return packed if packed.is_dir() else _PACKAGE.parent / "patches"


def load_ledger(directory: Path | None = None) -> dict[str, Entry]:
    """All entries by id, sorted.

    Args:
        directory: Of the files; the shipped ones when None.

    Raises:
        UserError: A file that is no entry, entries that do not fit together, or none at all.
    """
    place = directory or ledger_directory()
    entries = [_read(path) for path in sorted(place.glob("*.yaml"))]
    if not entries:  # or a check of all surfaces would be one of none
        raise UserError("holds no patch surface", field="ledger", value=str(place), fix="reinstall megacpp-stp")
    return checked(entries)


def checked(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by id.

    Raises:
        UserError: Two of one id, or a reference to none.
    """
    ledger: dict[str, Entry] = {}
    for entry in entries:
        if entry.id in ledger:
            raise UserError("is declared twice", field=f"patch {entry.id}", fix="give one of them another id")
        ledger[entry.id] = entry
    for entry in ledger.values():
        for other in (*entry.conflicts, *entry.after):
            if other not in ledger or other == entry.id:
                raise UserError(
                    "conflicts or after names a surface that is none", field=f"patch {entry.id}", value=other
                )
    return ledger


def find_entry(ledger: Mapping[str, Entry], name: str, *, field: str) -> Entry:
    """One entry.

    Args:
        ledger: Where to look.
        name: Its id.
        field: Where the id comes from, for the message.

    Raises:
        UserError: No such surface.
    """
    if name in ledger:
        return ledger[name]
    close = difflib.get_close_matches(name, ledger, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError("no such patch surface", field=field, value=name, fix=f"{hint}known: {', '.join(ledger) or 'none'}")


def _read(path: Path) -> Entry:
    try:
        entry = Entry.model_validate(yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = re.sub(r"^Value error, ", "", first["msg"])
        raise UserError(f"{where}: {problem}" if where else problem, field=path.name) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read: {error}", field=path.name, fix="reinstall megacpp-stp") from None
    if entry.id != path.stem:
        raise UserError("is the id of another file", field=path.name, value=entry.id, fix=f"call it {path.stem}")
    return entry
