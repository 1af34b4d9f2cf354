"""What became of a surface, and the refusal of a plan that lists one which cannot be active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.patches.judge import State

ALLOW_OPTION = "--allow-unreviewed"


class PatchRefused(UserError):
    """A surface that the plan lists cannot be active.

    Args:
        records: What became of each listed surface.
    """

    def __init__(self, problem: str, *, field: str, fix: str | None = None, records: Iterable[Record] = ()) -> None:
        super().__init__(problem, field=field, fix=fix)
        self.records = tuple(records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of one surface: plain data, and but for `probe` equal on all ranks of one code and one upstream.

    Attributes:
        id: Of the surface.
        state: How far it came.
        reason: Why not further, for a surface that is refused or retired.
        core_version: Of megatron-core.
        reviewed_at: The reviewed version that upstream equals here; None when it equals none.
        unreviewed: Definitions upstream that nobody reviewed and that the user allowed, or may allow.
        found: Fingerprints of all that the entry watches.
        code: sha256 of our package.
        probe: What its probe showed; numbers in it may depend on the processor.
    """

    id: str
    state: State = State.DECLARED
    reason: str | None = None
    core_version: str | None = None
    reviewed_at: str | None = None
    unreviewed: tuple[str, ...] = ()
    found: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    code: str | None = None
    probe: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For patches.json."""
        return {**asdict(replace(self, found={})), "found": dict(self.found), "unreviewed": list(self.unreviewed)}

    @property
    def warning(self) -> str | None:
        """What must be said aloud of a surface that runs on the user's word alone."""
        if not self.unreviewed or self.state in (State.REFUSED, State.RETIRED):
            return None
        return (
            f"WARNING: patch {self.id} meets code that nobody reviewed ({ALLOW_OPTION}): {', '.join(self.unreviewed)}"
        )


def require(records: Sequence[Record]) -> None:
    """Refuse what is refused or retired.

    Raises:
        PatchRefused: Naming the first of them, its reason and all others.
    """
    failed = [record for record in records if record.state in (State.REFUSED, State.RETIRED)]
    if failed:
        raise refusal(failed[0], records)


def refusal(failed: Record, records: Sequence[Record]) -> PatchRefused:
    """The refusal of a plan because of one record, with what it says of the others."""
    others = [record for record in records if record.reason and record.id != failed.id]
    fix = "see `megacpp-stp patches check`, and use a megatron-core that was reviewed"
    if failed.state is State.RETIRED:
        fix = f"delete patches/{failed.id}.yaml with its code, and what lists it in plans"
    elif failed.unreviewed:
        fix = f"review it as docs/patches.md says, or take the risk for this run with {ALLOW_OPTION} {failed.id}"
    also = "".join(f"\n  also: patch {record.id}: {record.state}: {record.reason}" for record in others)
    return PatchRefused(f"{failed.state}: {failed.reason}", field=f"patch {failed.id}", fix=fix + also, records=records)
