"""What the code of a surface gives the registry. docs/patches.md shows how to add a surface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Plan = Mapping[str, Any]


class ProbeFailed(Exception):
    """A probe saw something else than the surface promises; the message says what."""


class Hits:
    """How often a replacement was called, by the function upstream that called it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, consumer: str) -> None:
        """Count one call of the new code on behalf of `consumer`, as ``module:qualname``."""
        self._counts[consumer] += 1

    def clear(self) -> None:
        """Forget them."""
        self._counts.clear()

    @property
    def total(self) -> int:
        """All calls."""
        return self._counts.total()

    def as_dict(self) -> dict[str, int]:
        """Calls by consumer."""
        return dict(sorted(self._counts.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """What stands in for one target.

    Attributes:
        value: A function, a class or, in a table, any value. A module stands for its name there, and can be imported
            by that name as long as the surface is active: so its functions can count for one activation.
        counts_itself: The new code calls `Hits.add`, with the consumer's name, where it does its work. Needed for
            what is no function, and for what torch.compile traces: there a counter around it would break the graph.
    """

    value: Any
    counts_itself: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe works with; the surface is in place.

    Attributes:
        originals: By target, what it replaced; missing for a new entry of a table.
        through: By target and consumer, what that consumer finds through its own globals now. A probe calls the new
            code here.
        hits: Calls so far.
    """

    originals: Mapping[str, Any]
    through: Mapping[str, Mapping[str, Any]]
    hits: Hits


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """The code of a surface: `SURFACE` of the module that its ledger entry names as ``code``.

    Attributes:
        id: As in the ledger.
        unneeded: From the plan as plain data (plan.json), why it does not need the surface; None when it does.
            Imports no torch: the launcher asks, too.
        replace: From the originals by target (missing for a new entry of a table) and the counter, what stands in for
            each target of the entry.
        probe: Shows that the new code does what it is for: forward and gradient against the original where there are
            numbers, on small fp64 or fp32 CPU tensors, with no collective. Returns what it showed, in a clause; raises
            `ProbeFailed`, or a `UserError` for what the user can mend.
        configure: Called with Megatron's TransformerConfig before the model is built, for what is a setting there and
            no argument of Megatron's.
    """

    id: str
    unneeded: Callable[[Plan], str | None]
    replace: Callable[[Mapping[str, Any], Hits], Mapping[str, Replacement]]
    probe: Callable[[Probe], str]
    configure: Callable[[Any], None] = field(default=lambda config: None)
