"""What really differs between two plans, and what only follows from that.

A side is a plan as plain data, a receipt, or both. Its facts are flattened to leaves under the paths that ``--set``
uses, and compared leaf by leaf. Null and absent mean the same: the thing is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

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

_Path = tuple[str, ...]
_Facts = dict[_Path, Any]

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
    "substrate": "substrate",
}
# They name a recipe or say how it was come by, and change nothing that runs.
_LABELS = (("name",), ("title",), ("provenance",), ("overrides",))
# Parts of a plan that are not read leaf by leaf.
_TREATED_APART = {"recipe", "layout", "argv", "digest", "patches"}
# Where a receipt repeats the plan: place in the receipt, path in the plan.
_RECEIPT_PATHS: dict[_Path, _Path] = {
    ("recipe", "name"): ("name",),
    ("recipe", "provenance"): ("provenance",),
    ("recipe", "overrides"): ("overrides",),
    ("spec", "backend"): ("model", "backend"),
    ("pattern", "source"): ("layout", "source_pattern"),
    ("pattern", "megatron"): ("layout", "megatron_pattern"),
    ("auxiliary_losses", "stp"): ("stp",),
    ("auxiliary_losses", "moe_load_balancing"): ("model", "families", "E", "router", "aux_loss_coeff"),
    ("auxiliary_losses", "moe_z_loss"): ("model", "families", "E", "router", "z_loss_coeff"),
    ("topology", "world_size"): ("world_size",),
    ("topology", "data_parallel"): ("data_parallel",),
    ("topology", "micro_batches"): ("micro_batches",),
    **{("topology", size): ("parallel", size) for size in ("tensor", "pipeline", "virtual", "context", "expert")},
    ("seeds", "training"): ("training", "seed"),
    ("iterations_planned",): ("training", "iterations"),
    ("substrate", "hardware", "device"): ("device",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two things compared.

    Attributes:
        given: What the user named.
        kind: ``recipe``, ``plan`` or ``receipt``.
        digest: Of the plan.
        plan: The plan as plain data; None for a receipt that lies alone.
        receipt: The receipt; None when a plan or a recipe was named.
    """

    given: str
    kind: str
    digest: str
    plan: Mapping[str, Any] | None = None
    receipt: Mapping[str, Any] | None = None


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
    left, right = _facts(a, b), _facts(b, a)
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


def _facts(side: Side, other: Side) -> _Facts:
    """The leaves of one side that the other can have too."""
    both_ran = side.receipt is not None and other.receipt is not None
    if side.plan is not None:
        facts = _plan_facts(side.plan)
    else:
        facts = _repeated_facts(side.receipt or {})
    for lone in (side, other):
        if lone.plan is None:
            held = [path for source, path in _RECEIPT_PATHS.items() if _has(lone.receipt or {}, source)]
            facts = {path: value for path, value in facts.items() if any(path[: len(h)] == h for h in held)}
    if both_ran:
        facts.update(_run_facts(side.receipt or {}))
    else:
        source = side.plan if side.plan is not None else side.receipt or {}
        facts.update({("patches", name): "planned" for name in _patch_states(source)})
    return facts


def _plan_facts(plan: Mapping[str, Any]) -> _Facts:
    facts: _Facts = {}
    for key, value in plan.items():
        if key not in _TREATED_APART:
            facts.update(_leaves(value, (key,)))
    for key, value in plan["layout"].items():
        # Rows follow from the patterns, and the sizes repeat the recipe's.
        if key != "layers" and not _same(value, value_at(plan, ("recipe", "parallel", key))):
            facts.update(_leaves(value, ("layout", key)))
    for key, value in plan["recipe"].items():
        # A section of the recipe may one day be called like a part of the plan.
        facts.update(_leaves(value, ("recipe", key) if key in plan else (key,)))
    return facts


def _repeated_facts(receipt: Mapping[str, Any]) -> _Facts:
    """What a receipt repeats of its plan, under the plan's paths."""
    facts: _Facts = {}
    for source, path in _RECEIPT_PATHS.items():
        facts.update(_leaves(value_at(receipt, source), path))
    return facts


def _run_facts(receipt: Mapping[str, Any]) -> _Facts:
    """What only a run knows: substrate, content of its data, state of its patches. Not how it went."""
    facts: _Facts = {}
    for root in ("substrate", "data", "spec"):
        facts.update(_leaves(receipt.get(root), (root,)))
    for source in (("substrate", "hardware", "device"), ("spec", "backend")):  # the plan's
        facts.pop(source, None)
    facts.update({("patches", name): state for name, state in _patch_states(receipt).items()})
    return facts


def _patch_states(document: Mapping[str, Any]) -> dict[str, Any]:
    """Patches by id: a plan lists ids, a receipt ids and states."""
    patches = document.get("patches")
    states: dict[str, Any] = {}
    for patch in patches if isinstance(patches, list) else []:
        if isinstance(patch, Mapping):
            states[str(patch.get("id"))] = patch.get("state")
        else:
            states[str(patch)] = "planned"
    return states


def _leaves(value: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """Leaves under `path`. A list is a leaf: taps and stages mean something only as a whole."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif value is not None:
        yield path, value


def _differing(left: _Facts, right: _Facts) -> Iterator[Difference]:
    for path in sorted(left.keys() | right.keys()):
        a, b = left.get(path), right.get(path)
        if not _same(a, b):
            yield Difference(group=_group(path), path=".".join(path), a=a, b=b)


def _same(a: Any, b: Any) -> bool:
    """Equality without Python's `True == 1`; 0 and 0.0 are the same number."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _group(path: _Path) -> str:
    if path in _LABELS:
        return _LABEL
    if path[:2] == ("parallel", "stages"):
        return "topology"
    return _GROUP_OF_ROOT.get(path[1] if path[0] == "recipe" and len(path) > 1 else path[0], "other")


def _consequences(a: Side, b: Side) -> Iterator[Consequence]:
    if a.plan is not None and b.plan is not None:
        yield from _argv_consequence(a.plan["argv"], b.plan["argv"])
        yield from _layer_consequence(a.plan["layout"]["layers"], b.plan["layout"]["layers"])
    if a.receipt is not None and b.receipt is not None:
        total = ("parameters", "total")
        counts = [value_at(side.receipt, total) for side in (a, b)]
        if not _same(*counts):
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
        if number >= min(len(a), len(b)) or not _same(a[number], b[number])
    ]
    if numbers:
        rows = [[side[number] for number in numbers if number < len(side)] for side in (a, b)]
        items = tuple(str(number + 1) for number in numbers)
        yield Consequence(path="layout.layers", items=items, a=rows[0], b=rows[1])


def _promoted(item: Consequence) -> Difference:
    return Difference(group=_group(tuple(item.path.split("."))), path=item.path, a=item.a, b=item.b)


def _idle_overrides(left: _Facts, right: _Facts, differences: Sequence[Difference]) -> Iterator[IdleOverride]:
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


def _has(document: Mapping[str, Any], path: _Path) -> bool:
    """Whether a receipt says anything at `path`, null included."""
    above = value_at(document, path[:-1])
    return isinstance(above, Mapping) and path[-1] in above


def value_at(document: Any, path: Sequence[str]) -> Any:
    """The value at `path`; None where there is none."""
    for key in path:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
