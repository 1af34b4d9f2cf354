"""The registry: from what a plan lists to surfaces that are proven active, or to a refusal; and back.

A surface is an entry of the ledger (`megacpp_stp.patches.ledger`) and a module with its `Surface`
(`megacpp_stp.patches.contract`). `Registry.examine` takes it to ``fingerprint ok`` from files alone; the launcher does
that. `Registry.activate` takes it to ``active`` in a rank, before the first collective:

1. the plan lists it and its predicate agrees; no conflict with another listed surface        -> eligible
2. the megatron-core that would be imported is as reviewed (`megacpp_stp.patches.judge`)        -> fingerprint ok
3. every place where the target is bound was found, and nothing else has it; all are replaced   -> applied
4. every consumer finds the replacement through its own globals, and the probe called it there  -> reached
5. the probe saw the behaviour that the surface promises                                        -> active

Everything is checked for all listed surfaces before the first replacement, and a failure takes back all of them. Then
all ranks compare their records, and after the first training iteration the consumers must really have called what was
put there: both in `megacpp_stp.patches.agreement`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.patches.contract import Hits, Plan, ProbeFailed, Surface
from megacpp_stp.patches.judge import State, judge
from megacpp_stp.patches.ledger import Entry, checked, find_entry, load_ledger
from megacpp_stp.patches.loaded import foreign
from megacpp_stp.patches.mechanics import Applied, apply, prove, refuse_with_a_model, restore
from megacpp_stp.patches.places import MARK, Place, Unreachable, places_of, plain
from megacpp_stp.patches.records import ALLOW_OPTION, PatchRefused, Record, refusal, require
from megacpp_stp.patches.upstream import Core, open_core

_PACKAGE = Path(__file__).resolve().parents[1]


class Activation(AbstractContextManager["Activation"]):
    """Surfaces that are active; leaving the context takes back those that this activation applied.

    Attributes:
        records: Of all surfaces that the plan lists, in the order of application.
        ledger: Of the registry.
    """

    def __init__(self, registry: Registry, listed: Sequence[Applied], *, new: Sequence[Applied]) -> None:
        self.records = tuple(applied.record for applied in listed)
        self.ledger = registry.ledger
        self._registry = registry
        self._listed = tuple(listed)
        self._new = list(new)

    def calls(self) -> dict[str, dict[str, int]]:
        """By surface and by consumer, how often the new code was called since its probe, on this rank."""
        return {applied.entry.id: applied.hits.as_dict() for applied in self._listed}

    def configure(self, transformer_config: Any) -> None:
        """Let each surface set what it needs in Megatron's TransformerConfig, before the model is built."""
        for applied in self._listed:
            applied.surface.configure(transformer_config)

    def undo(self) -> None:
        """Put back, in reverse order, what this activation replaced. A second call does nothing.

        Raises:
            RuntimeError: Something else was put over a replacement since; then nothing is put back.
        """
        new, self._new = self._new, []
        try:
            restore(new)
        except RuntimeError:
            self._new = new
            raise
        for applied in new:
            self._registry._active.pop(applied.entry.id, None)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


class Registry:
    """All declared surfaces, and which of them this registry has made active.

    Args:
        ledger: Entries by id; see `megacpp_stp.patches.ledger.load_ledger`.
        code: Surfaces by id; when None each entry's module is imported as it is needed.
    """

    def __init__(self, ledger: Mapping[str, Entry], code: Mapping[str, Surface] | None = None) -> None:
        self.ledger = checked(ledger.values())
        self._code = code
        self._active: dict[str, Applied] = {}

    @classmethod
    def load(cls) -> Registry:
        """The shipped surfaces."""
        return cls(load_ledger())

    def surface(self, name: str) -> Surface:
        """The code of a surface."""
        if self._code is not None:
            return self._code[name]
        surface = importlib.import_module(self.ledger[name].code).SURFACE
        assert isinstance(surface, Surface) and surface.id == name, name
        return surface

    def examine(self, plan: Plan, *, core: Core, allow_unreviewed: Sequence[str] = ()) -> tuple[Record, ...]:
        """Take what a plan lists to ``fingerprint ok``, ``refused`` or ``retired``, from files alone.

        Args:
            plan: As plain data; its ``patches`` are ids.
            core: The megatron-core that would run.
            allow_unreviewed: Ids of surfaces that may meet upstream code that nobody reviewed.

        Returns:
            Their records, in the order of application.

        Raises:
            UserError: An id that is no surface, or a permission that nothing needs.
        """
        code = code_hash()
        records = [self._examine(entry, plan, core, allow_unreviewed, code) for entry in self._in_order(plan)]
        listed = {record.id: record for record in records}
        for name in allow_unreviewed:
            find_entry(self.ledger, name, field=ALLOW_OPTION)
            if name not in listed:
                raise UserError("is not in the plan", field=ALLOW_OPTION, value=name, fix="leave it out")
            if listed[name].state is State.FINGERPRINT_OK and not listed[name].unreviewed:
                raise UserError("has nothing unreviewed", field=ALLOW_OPTION, value=name, fix="leave it out")
        return tuple(records)

    def activate(self, plan: Plan, *, core: Core | None = None, allow_unreviewed: Sequence[str] = ()) -> Activation:
        """Make active what a plan lists, and nothing else.

        What this registry has made active already is left as it is. To be called before the first collective and
        before a model exists.

        Args:
            plan: As plain data; its ``patches`` are ids.
            core: The megatron-core that this process imports; found when None.
            allow_unreviewed: See `examine`.

        Raises:
            PatchRefused: A listed surface cannot be active; nothing is left replaced.
            UserError: See `examine`; or what a probe found that the user can mend.
        """
        core = core or open_core()
        records = self.examine(plan, core=core, allow_unreviewed=allow_unreviewed)
        require(records)
        pending = [record for record in records if record.id not in self._active]
        if pending:
            refuse_with_a_model(records)
        places = self._claim(pending, core)
        new: list[Applied] = []
        try:
            for record in pending:
                entry, surface = self.ledger[record.id], self.surface(record.id)
                applied = Applied(entry=entry, surface=surface, record=record, hits=Hits())
                new.append(applied)
                apply(applied, places[record.id])
                prove(applied)
        except BaseException as error:
            restore(new)
            if isinstance(error, Unreachable | ProbeFailed):
                failed = replace(applied.record, state=State.REFUSED, reason=str(error))
                raise refusal(failed, [failed if record.id == failed.id else record for record in records]) from error
            raise
        self._active.update((applied.entry.id, applied) for applied in new)
        return Activation(self, [self._active[record.id] for record in records], new=new)

    def _in_order(self, plan: Plan) -> list[Entry]:
        """The listed entries, each after those that it wants before it, else in the plan's order."""
        listed = [find_entry(self.ledger, name, field="patches of the plan") for name in plan["patches"]]
        waiting = {entry.id: entry for entry in listed}
        if len(waiting) < len(listed):
            raise UserError("names a surface twice", field="patches of the plan", value=list(plan["patches"]))
        ordered: list[Entry] = []
        while waiting:
            ready = next((entry for entry in waiting.values() if not waiting.keys() & set(entry.after)), None)
            if ready is None:
                names = ", ".join(waiting)
                raise PatchRefused("each wants to be applied after another", field=f"patches {names}")
            ordered.append(waiting.pop(ready.id))
        return ordered

    def _examine(self, entry: Entry, plan: Plan, core: Core, allow_unreviewed: Sequence[str], code: str) -> Record:
        record = Record(id=entry.id)
        listed = [self.ledger[name] for name in plan["patches"] if name != entry.id]
        if (why := _conflict(entry, listed)) is not None:
            return replace(record, state=State.REFUSED, reason=why)
        if (why := self.surface(entry.id).unneeded(plan)) is not None:
            return replace(record, state=State.REFUSED, reason=f"the plan lists it and does not need it: {why}")
        verdict = judge(entry, core)
        allowed = verdict.can_be_allowed and entry.id in allow_unreviewed
        return replace(
            record,
            state=State.FINGERPRINT_OK if allowed else verdict.state,
            reason=None if allowed else verdict.reason,
            core_version=verdict.core_version,
            reviewed_at=verdict.reviewed_at,
            unreviewed=verdict.changed if verdict.can_be_allowed else (),
            found=verdict.found,
            code=code,
        )

    def _claim(self, records: Sequence[Record], core: Core) -> dict[str, list[list[Place]]]:
        """All places of all surfaces, found and checked before anything is replaced."""
        claimed: dict[str, list[list[Place]]] = {}
        for record in records:
            try:
                claimed[record.id] = [places_of(replaced) for replaced in self.ledger[record.id].replaces]
                for place in (place for places in claimed[record.id] for place in places):
                    owner = getattr(plain(place.get()), MARK, None)
                    if owner is not None and owner not in self._active:
                        raise Unreachable(f"{place.name} is replaced already, by surface {owner} of another registry")
                if others := list(foreign(self.ledger[record.id], core)):
                    raise Unreachable(f"not what the files define, but put there before: {', '.join(others)}")
            except Unreachable as error:
                failed = replace(record, state=State.REFUSED, reason=str(error))
                raise refusal(failed, [failed if other is record else other for other in records]) from error
        return claimed


def _conflict(entry: Entry, others: Sequence[Entry]) -> str | None:
    mine = {replaced.name for replaced in entry.replaces}
    for other in others:
        if other.id in entry.conflicts or entry.id in other.conflicts:
            return f"it conflicts with {other.id}, which the plan lists too"
        shared = mine & {replaced.name for replaced in other.replaces}
        if shared and entry.id not in other.after and other.id not in entry.after:
            return (
                f"{other.id} replaces {', '.join(sorted(shared))} too, and neither is declared to come after the other"
            )
    return None


def code_hash() -> str:
    """sha256 of all our code: what a surface puts in place may be anywhere in it."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
