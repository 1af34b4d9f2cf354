"""One thing that was looked at before a run: what was found, whether it will do, why it matters, how to mend it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from megacpp_stp.errors import UserError


class Verdict(StrEnum):
    """What follows from a finding."""

    FINE = "fine"
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, in a word or two.
        found: What is there, in a clause.
        verdict: What follows.
        why: Why it matters; empty where `found` says it all.
        fix: How to mend it; None where nothing is to mend.
        field: The option or recipe field that it is about; None for none.
        error: The refusal as it was raised, for `refusal`; None for one that was not.
    """

    name: str
    found: str
    verdict: Verdict
    why: str = ""
    fix: str | None = None
    field: str | None = None
    error: UserError | None = dataclasses.field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, str | None]:
        """Plain data with stable names: what ``--format json`` prints."""
        return {
            "name": self.name,
            "found": self.found,
            "verdict": str(self.verdict),
            "why": self.why,
            "fix": self.fix,
            "field": self.field,
        }

    @property
    def text(self) -> str:
        """In one line, without how to mend it."""
        about = self.field or self.name
        named = self.found if self.found.startswith(f"{about} ") else f"{about}: {self.found}"
        return named + (f": {self.why}" if self.why else "")


def fine(name: str, found: str, why: str = "") -> Finding:
    """Nothing to mend."""
    return Finding(name=name, found=found, verdict=Verdict.FINE, why=why)


def warning(name: str, found: str, *, why: str, fix: str) -> Finding:
    """The run may start, and may not end well."""
    return Finding(name=name, found=found, verdict=Verdict.WARNING, why=why, fix=fix)


def refused(name: str, found: str, *, why: str, fix: str, field: str | None = None) -> Finding:
    """The run must not start."""
    return Finding(name=name, found=found, verdict=Verdict.REFUSED, why=why, fix=fix, field=field)


def asked(name: str, check: Callable[[], str | None], *, why: str = "", good: str = "as the plan needs it") -> Finding:
    """The finding of a check that raises.

    Args:
        name: What is looked at.
        check: Returns what it found, or None, or raises a `UserError`.
        why: Why it matters.
        good: What was found where it returns None.
    """
    try:
        return fine(name, check() or good, why)
    except UserError as error:
        found = error.problem if error.value is None else f"{error.problem} (got {error.value!r})"
        return Finding(
            name=name, found=found, verdict=Verdict.REFUSED, why=why, fix=error.fix, field=error.field, error=error
        )


def refusal(findings: Iterable[Finding]) -> UserError | None:
    """What to raise of findings: the first refusal, with all others in its message; None when none is refused."""
    bad = [one for one in findings if one.verdict is Verdict.REFUSED]
    if not bad:
        return None
    first, *rest = bad
    more = "".join(f"\n  also: {other.text}" for other in rest)
    error = first.error
    if error is None:
        return UserError(f"{first.found}: {first.why}", field=first.field or first.name, fix=f"{first.fix}{more}")
    if not more:
        return error
    if error.value is None:
        return UserError(error.problem, field=error.field, fix=f"{error.fix or ''}{more}")
    return UserError(error.problem, field=error.field, value=error.value, fix=f"{error.fix or ''}{more}")
