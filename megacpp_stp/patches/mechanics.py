"""Putting one surface in place, proving it, and taking surfaces back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from megacpp_stp.patches.contract import Hits, Probe, ProbeFailed, Surface
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.ledger import Entry
from megacpp_stp.patches.places import MARK, Place, Unreachable, is_missing, names_of, plain, seen_by, stand_in
from megacpp_stp.patches.records import PatchRefused, Record

_WHOLE_MODEL = "megatron.core.models.common.language_module.language_module", "LanguageModule"


@dataclass(slots=True, kw_only=True)
class Applied:
    """A surface in place: its places with what was and what is there, in the order of application."""

    entry: Entry
    surface: Surface
    record: Record
    hits: Hits
    bindings: list[tuple[Place, Any, Any]] = field(default_factory=list)
    originals: dict[str, Any] = field(default_factory=dict)
    replacements: dict[str, Any] = field(default_factory=dict)

    def bind(self, place: Place, value: Any) -> None:
        """Put `value` there, and remember what was.

        Raises:
            Unreachable: The place keeps what it had.
        """
        before = place.get()
        place.set(value)
        if place.get() is not value:
            raise Unreachable(f"{place.name} cannot be replaced")
        self.bindings.append((place, before, value))


def refuse_with_a_model(records: Sequence[Record]) -> None:
    """Compiled functions, CUDA graphs and hooks of a model that exists keep what they found when it was built.

    Raises:
        PatchRefused: This process has a language model of Megatron's.
    """
    module, name = _WHOLE_MODEL
    if module not in sys.modules:
        return
    kind = getattr(sys.modules[module], name)
    built = _instance_of(kind)
    if built is not None:  # perhaps one that is done with
        gc.collect()
        built = _instance_of(kind)
    if built is not None:
        raise PatchRefused(
            f"a model exists already, a {built.__qualname__}: it may keep what would be replaced",
            field="patches",
            fix="apply patches before building a model",
            records=records,
        )


def _instance_of(kind: type) -> type | None:
    return next((type(thing) for thing in gc.get_objects() if issubclass(type(thing), kind)), None)


def apply(applied: Applied, places: Sequence[Sequence[Place]]) -> None:
    """Replace all targets of one surface.

    Args:
        applied: Is filled.
        places: For each target of the entry, where it is bound; its own place first.
    """
    consumers = tuple(consumer.function for replaced in applied.entry.replaces for consumer in replaced.consumers)
    homes = {replaced.name: found[0] for replaced, found in zip(applied.entry.replaces, places, strict=True)}
    present = {name: home.get() for name, home in homes.items()}
    applied.originals = {name: plain(value) for name, value in present.items() if not is_missing(value)}
    replacements = applied.surface.replace(applied.originals, applied.hits)
    assert replacements.keys() == homes.keys(), f"{applied.entry.id} replaces {sorted(replacements)}"
    for (name, value), found in zip(present.items(), places, strict=True):
        new = stand_in(value, replacements[name], surface=applied.entry.id, hits=applied.hits, consumers=consumers)
        applied.replacements[name] = new
        if isinstance(module := replacements[name].value, ModuleType):
            applied.bind(Place(holder=sys.modules, name=module.__name__, is_entry=True), module)
        for place in found:
            applied.bind(place, new)
    applied.record = replace(applied.record, state=State.APPLIED)


def prove(applied: Applied) -> None:
    """Reach the new code through each consumer's globals, and see that it does what it is for.

    Raises:
        ProbeFailed: The new code does something else, or was not called.
    """
    through: dict[str, dict[str, Any]] = {}
    for replaced in applied.entry.replaces:
        found = {consumer.function: seen_by(consumer, replaced) for consumer in replaced.consumers}
        through[replaced.name] = found
        # All places through which consumers look were replaced, and each now holds its replacement.
        assert all(value is plain(applied.replacements[replaced.name]) for value in found.values()), found
    applied.record = replace(applied.record, state=State.REACHED)
    applied.hits.clear()
    shown = applied.surface.probe(Probe(originals=applied.originals, through=through, hits=applied.hits))
    if not applied.hits.total:
        raise ProbeFailed("its probe never came to the new code")
    applied.hits.clear()
    applied.record = replace(applied.record, state=State.ACTIVE, probe=shown)


def restore(applied: Sequence[Applied]) -> None:
    """Put back, in reverse order, what was there before.

    Raises:
        RuntimeError: A place holds something else than its replacement; then nothing is put back.
    """
    bindings = [binding for one in applied for binding in one.bindings]
    present: dict[tuple[int, str], Any] = {}
    for place, before, new in reversed(bindings):
        if present.get(place.key, place.get()) is not new:
            raise RuntimeError(f"{place.name} is no longer the replacement of patch {getattr(plain(new), MARK, '')}")
        present[place.key] = before
    for place, before, new in reversed(bindings):
        place.set(before)
        if callable(new):  # modules that were imported in the meantime have its name, too
            for late in list(names_of(new, "megatron")):
                late.set(before)
