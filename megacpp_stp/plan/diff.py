"""What really differs between two plans, and what only follows from that.

A side is a plan as plain data, a receipt, or both. Its facts are flattened to leaves under the paths that ``--set``
uses, and compared leaf by leaf. Null and absent mean the same: the thing is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megacpp_stp.plan.facts import STAGES, STAGES_FROM, Facts, Path, Side, facts_of, same, value_at

DIFF_FORMAT = 1
GROUPS = (
    "topology",
    "optimisation",
    "parallelism",
    "STP",
    "data",
    "patches",
    "environment",
    "substrate",
    "other",
)
_LABEL = "label"
EQUAL, EQUAL_IN_EFFECT, DIFFERENT = "equal", "equal in effect", "different"


_GROUP_OF_ROOT = {
    "model": "topology",
    "layout": "topology",
    "spec": "topology",
    "parameters": "topology",
    "optimizer": "optimisation",
    "training": "optimisation",
    "parallel": "parallelism",
    "launch": "parallelism",
    "world_size": "parallelism",
    "data_parallel": "parallelism",
    "micro_batches": "parallelism",
    "stp": "STP",
    "data": "data",
    "patches": "patches",
    "device": "environment",
    "env": "environment",
    "environment": "environment",
    "substrate": "substrate",
}
# They name a recipe or say how it was come by, and change nothing that runs.
_LABELS = (("name",), ("title",), ("provenance",), ("overrides",), STAGES_FROM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A leaf that differs.

    Attributes:
        group: One of `GROUPS`; ``label`` for what names a plan and changes nothing that runs.
        path: As ``--set`` writes it.
        a: Value on the first side; None when it is not there.
        b: Value on the second side.
    """

    group: str
    path: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Consequence:
    """Something that differs because of the differences.

    Attributes:
        path: ``argv``, ``layout.layers``, ``parameters.total`` or ``digest``.
        items: Which options, or which layer numbers; empty for a single value.
        a: What the first side has there.
        b: What the second side has there.
    """

    path: str
    items: tuple[str, ...]
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleOverride:
    """An override that one side has and that makes no difference to the other.

    Attributes:
        side: ``a`` or ``b``.
        override: As it was written.
    """

    side: str
    override: str


@dataclass(frozen=True, kw_only=True)
class PlanDiff:
    """The comparison of two sides.

    Attributes:
        a: The first side.
        b: The second side.
        complete: Whether every leaf was compared. False when a receipt lies alone: it holds some of them only.
        differences: What differs, by group and path.
        labels: Names, provenance and overrides that differ.
        consequences: What differs because of `differences`.
        idle_overrides: Overrides of one side that are equal in effect.
    """

    a: Side
    b: Side
    complete: bool
    differences: tuple[Difference, ...]
    labels: tuple[Difference, ...]
    consequences: tuple[Consequence, ...]
    idle_overrides: tuple[IdleOverride, ...]

    @cached_property
    def verdict(self) -> str:
        """`EQUAL`, `EQUAL_IN_EFFECT` (labels differ, or 0 is written 0.0) or `DIFFERENT`."""
        if self.differences:
            return DIFFERENT
        return EQUAL if self.a.digest == self.b.digest else EQUAL_IN_EFFECT

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same sides."""

        def side(one: Side) -> dict[str, str]:
            return {"given": one.given, "kind": one.kind, "digest": one.digest}

        return {
            "diff_format": DIFF_FORMAT,
            "verdict": self.verdict,
            "complete": self.complete,
            "a": side(self.a),
            "b": side(self.b),
            "differences": [asdict(item) for item in self.differences],
            "labels": [{"path": item.path, "a": item.a, "b": item.b} for item in self.labels],
            "consequences": [{"path": item.path, "items": list(item.items)} for item in self.consequences],
            "idle_overrides": [asdict(item) for item in self.idle_overrides],
        }


def compare(a: Side, b: Side) -> PlanDiff:
    """Compare two sides."""
    complete = a.plan is not None and b.plan is not None
    left, right = facts_of(a, b), facts_of(b, a)
    found = list(_differing(left, right))
    labels = tuple(item for item in found if item.group == _LABEL)
    differences = [item for item in found if item.group != _LABEL]
    consequences = list(_consequences(a, b))
    digest = [Consequence(path="digest", items=(), a=a.digest, b=b.digest)] if a.digest != b.digest else []
    if differences:
        consequences += digest
    else:
        # Nothing that they could follow from: another version plans the same recipe differently, or a receipt
        # that lies alone does not hold what differs.
        unexplained = consequences or ([] if complete else digest)
        differences = [_promoted(item) for item in unexplained]
        consequences = []
    return PlanDiff(
        a=a,
        b=b,
        complete=complete,
        differences=tuple(sorted(differences, key=lambda item: (GROUPS.index(item.group), item.path))),
        labels=labels,
        consequences=tuple(consequences),
        idle_overrides=tuple(_idle_overrides(left, right, differences)) if complete else (),
    )


def _differing(left: Facts, right: Facts) -> Iterator[Difference]:
    for path in sorted(left.keys() | right.keys()):
        a, b = left.get(path), right.get(path)
        if not same(a, b):
            yield Difference(group=_group(path), path=".".join(path), a=a, b=b)


def _group(path: Path) -> str:
    if path in _LABELS:
        return _LABEL
    if path[:2] == STAGES:
        return "topology"
    return _GROUP_OF_ROOT.get(path[1] if path[0] == "recipe" and len(path) > 1 else path[0], "other")


def _consequences(a: Side, b: Side) -> Iterator[Consequence]:
    if a.plan is not None and b.plan is not None:
        yield from _argv_consequence(a.plan["argv"], b.plan["argv"])
        yield from _layer_consequence(a.plan["layout"]["layers"], b.plan["layout"]["layers"])
    if a.receipt is not None and b.receipt is not None:
        total = ("parameters", "total")
        counts = [value_at(side.receipt, total) for side in (a, b)]
        if not same(*counts):
            yield Consequence(path=".".join(total), items=(), a=counts[0], b=counts[1])


def _argv_consequence(a: Sequence[str], b: Sequence[str]) -> Iterator[Consequence]:
    left, right = _arguments(a), _arguments(b)
    if left == right:
        return
    only_left, only_right = Counter(left) - Counter(right), Counter(right) - Counter(left)
    options = sorted({argument[0] for argument in (*only_left, *only_right)})

    # Nothing on either side means the same arguments in another order, which Megatron may well read differently.
    def listed(only: Counter[tuple[str, ...]], whole: list[tuple[str, ...]]) -> list[list[str]]:
        return [list(argument) for argument in (only if options else whole)]

    yield Consequence(
        path="argv", items=tuple(options) or ("(order)",), a=listed(only_left, left), b=listed(only_right, right)
    )


def _arguments(argv: Sequence[str]) -> list[tuple[str, ...]]:
    """Options, each with its values."""
    found: list[tuple[str, ...]] = []
    for token in argv:
        if token.startswith("--") or not found:
            option, separator, value = token.partition("=")
            found.append((option, value) if separator else (option,))
        else:
            found[-1] = (*found[-1], token)
    return found


def _layer_consequence(a: Sequence[Any], b: Sequence[Any]) -> Iterator[Consequence]:
    numbers = [
        number
        for number in range(max(len(a), len(b)))
        if number >= min(len(a), len(b)) or not same(a[number], b[number])
    ]
    if numbers:
        rows = [[side[number] for number in numbers if number < len(side)] for side in (a, b)]
        items = tuple(str(number + 1) for number in numbers)
        yield Consequence(path="layout.layers", items=items, a=rows[0], b=rows[1])


def _promoted(item: Consequence) -> Difference:
    return Difference(group=_group(tuple(item.path.split("."))), path=item.path, a=item.a, b=item.b)


def _idle_overrides(left: Facts, right: Facts, differences: Sequence[Difference]) -> Iterator[IdleOverride]:
    """Overrides of one side only under whose path nothing differs."""
    found = [facts.get(("overrides",)) for facts in (left, right)]
    written = [value if isinstance(value, list) else [] for value in found]
    for side, mine, others in (("a", written[0], written[1]), ("b", written[1], written[0])):
        for override in mine:
            path = str(override).partition("=")[0] + "."
            touched = any(
                (item.path + ".").startswith(path) or path.startswith(item.path + ".") for item in differences
            )
            if override not in others and not touched:
                yield IdleOverride(side=side, override=str(override))
