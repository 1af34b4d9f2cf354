"""The facts of a plan or a receipt, flattened to leaves under the paths that ``--set`` uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_stp.plan.env_guard import computing_environment
from megacpp_stp.plan.places import without_place

Path = tuple[str, ...]
Facts = dict[Path, Any]

STAGES, STAGES_FROM = ("parallel", "stages"), ("parallel", "stages", "chosen by")
# Parts of a plan that are not read leaf by leaf.
_TREATED_APART = {"recipe", "layout", "argv", "digest", "patches"}
# Where a receipt repeats the plan: place in the receipt, path in the plan.
_RECEIPT_PATHS: dict[Path, Path] = {
    ("recipe", "name"): ("name",),
    ("recipe", "provenance"): ("provenance",),
    ("recipe", "overrides"): ("overrides",),
    ("spec", "backend"): ("model", "backend"),
    **{("spec", "kernels", family): ("model", "families", family, "kernel") for family in ("M", "R")},
    ("pattern", "source"): ("layout", "source_pattern"),
    ("pattern", "megatron"): ("layout", "megatron_pattern"),
    ("auxiliary_losses", "stp"): ("stp",),
    ("auxiliary_losses", "moe_load_balancing"): ("model", "families", "E", "router", "aux_loss_coeff"),
    ("auxiliary_losses", "mtp"): ("model", "mtp"),
    ("auxiliary_losses", "dsa_indexer"): ("model", "families", "A", "sparse", "loss_coeff"),
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


def facts_of(side: Side, other: Side) -> Facts:
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
            facts |= _as_receipts_say(facts)
    if both_ran:
        facts.update(_run_facts(side.receipt or {}))
        facts.update(_environment_facts(side, other))
    else:
        source = side.plan if side.plan is not None else side.receipt or {}
        facts.update({("patches", name): "planned" for name in _patch_states(source)})
    return facts


def _as_receipts_say(facts: Facts) -> Facts:
    """What a receipt says in other words than a plan."""
    given = facts.get(("overrides",))
    return {("overrides",): [without_place(str(item)) for item in given]} if isinstance(given, list) else {}


def _plan_facts(plan: Mapping[str, Any]) -> Facts:
    facts: Facts = {}
    for key, value in plan.items():
        if key not in _TREATED_APART:
            facts.update(_leaves(value, (key,)))
    for key, value in plan["layout"].items():
        # Rows follow from the patterns, and the sizes repeat the recipe's.
        if key != "layers" and not same(value, value_at(plan, ("recipe", "parallel", key))):
            facts.update(_leaves(value, ("layout", key)))
    for key, value in plan["recipe"].items():
        # A section of the recipe may one day be called like a part of the plan.
        facts.update(_leaves(value, ("recipe", key) if key in plan else (key,)))
    if facts.get(STAGES) == "auto":  # the same cut is the same run, whoever chose it
        facts[STAGES], facts[STAGES_FROM] = facts.pop(("layout", "stages")), "auto"
    return facts


def _repeated_facts(receipt: Mapping[str, Any]) -> Facts:
    """What a receipt repeats of its plan, under the plan's paths."""
    facts: Facts = {}
    for source, path in _RECEIPT_PATHS.items():
        facts.update(_leaves(value_at(receipt, source), path))
    return facts


def _run_facts(receipt: Mapping[str, Any]) -> Facts:
    """What only a run knows: substrate, content of its data, state of its patches. Not how it went."""
    facts: Facts = {}
    for root in ("substrate", "data", "spec"):
        facts.update(_leaves(receipt.get(root), (root,)))
    for source in _RECEIPT_PATHS:  # the plan's
        facts.pop(source, None)
    facts.update({("patches", name): state for name, state in _patch_states(receipt).items()})
    return facts


def _environment_facts(side: Side, other: Side) -> Facts:
    """What a plan leaves to the machine that it runs on; what either plan says is compared there.

    Receipts of earlier runs say nothing of it, and then nothing is compared.
    """
    found = [(lone.receipt or {}).get("environment") for lone in (side, other)]
    mine, planned = found[0], {name for lone in (side, other) for name in value_at(lone.plan, ["env"]) or ()}
    if not isinstance(mine, Mapping) or not isinstance(found[1], Mapping):
        return {}
    return {("environment", name): value for name, value in computing_environment(mine).items() if name not in planned}


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


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Leaves under `path`. A list is a leaf: taps and stages mean something only as a whole."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif value is not None:
        yield path, value


def same(a: Any, b: Any) -> bool:
    """Equality without Python's `True == 1`; 0 and 0.0 are the same number."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _has(document: Mapping[str, Any], path: Path) -> bool:
    """Whether a receipt says anything at `path`, null included."""
    above = value_at(document, path[:-1])
    return isinstance(above, Mapping) and path[-1] in above


def value_at(document: Any, path: Sequence[str]) -> Any:
    """The value at `path`; None where there is none."""
    for key in path:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
