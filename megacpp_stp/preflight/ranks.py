"""All ranks of a run must be the same software, on the same plan and data: who differs is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from megacpp_stp.errors import UserError

CLOCK_LIMIT_S = 5.0
"""Clocks of nodes further apart than this are reported; what depends on them is said in `clock_warning`."""
_SHOWN = 24  # characters of a value: digests are longer
_FIXES = {
    "plan": "let all nodes read one run directory",
    "patches": "install the same megacpp-stp and megatron-core on every node",
    "code": "install the same megacpp-stp on every node",
    "megacpp-stp": "install the same megacpp-stp on every node",
    "data": "copy the same prepared dataset to every node, or share one",
    "driver": "use nodes with the same driver, or have it updated: a container brings its own CUDA, and no driver",
    "apex": "install the same apex on every node, or none: nothing here needs it, and Megatron uses it where it is",
}
_SAME_VERSION = "install the same version on every node; one container image for all is the simplest way"

Facts = Mapping[str, Any]
"""What one rank says of itself: ``same`` (what must be equal, by name), ``node`` (its host), ``device``, and more."""


def disagreement(by_rank: Sequence[Facts]) -> UserError | None:
    """Compare what the ranks say of themselves.

    Args:
        by_rank: Of each rank, in order.

    Returns:
        What to raise on every rank: the odd ones named, against what most have (what the first has, where there is no
        majority), one line for each name that differs; None where all agree.
    """
    names = list(dict.fromkeys(name for facts in by_rank for name in facts["same"]))
    texts = [text for name in names if (text := _difference(name, by_rank)) is not None]
    if not texts:
        return None
    first = next(name for name in names if _difference(name, by_rank) is not None)
    more = "".join(f"\n  also: {text}" for text in texts[1:])
    return UserError(texts[0], field="ranks", fix=_FIXES.get(first, _SAME_VERSION) + more)


def missing(ranks: Sequence[int], *, world_size: int, seconds: float) -> UserError:
    """What to raise where ranks did not come."""
    verb = "has" if len(ranks) == 1 else "have"
    return UserError(
        f"{spans(ranks)} of {world_size} {verb} not come to the comparison within {seconds:g} s",
        field="ranks",
        fix="look at what is last in the output of that rank; its node may be slow to import, or hang",
    )


def device_warning(by_rank: Sequence[Facts]) -> str | None:
    """What to say aloud of ranks on unlike GPUs; None where all are alike."""
    found: dict[str, list[int]] = {}
    for rank, facts in enumerate(by_rank):
        found.setdefault(facts["device"], []).append(rank)
    if len(found) < 2:
        return None
    which = ", ".join(f"{name} ({spans(ranks)})" for name, ranks in found.items())
    return f"WARNING: GPUs differ: {which}: the slowest sets the pace, the smallest the size"


def clock_skew(by_node: Mapping[str, Sequence[tuple[float, float, float]]]) -> dict[str, float]:
    """How far the clock of each node is certainly off the first rank's.

    Args:
        by_node: Of each node's ranks (before, own, after): seconds of the first rank's clock before the rank read its
            own, what that showed, and the first rank's after it.

    Returns:
        Seconds by node: the part that no delay explains, so that slow messages alone give 0.
    """
    return {
        node: max((max(before - own, own - after, 0.0) for before, own, after in readings), default=0.0)
        for node, readings in by_node.items()
    }


def clock_warning(skew: Mapping[str, float]) -> str | None:
    """What to say aloud of clocks that are off; None where they are not."""
    off = {node: seconds for node, seconds in skew.items() if seconds > CLOCK_LIMIT_S}
    if not off:
        return None
    which = ", ".join(f"node {node} by {seconds:.0f} s" for node, seconds in sorted(off.items()))
    return (
        f"WARNING: clocks differ from the first rank's: {which}: of several failing ranks the wrong one may be named "
        "as the first, and times in logs do not compare\n  fix: start NTP (chronyd) on every node"
    )


def spans(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    runs = []
    for _, group in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0]):
        found = [rank for _, rank in group]
        runs.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(runs)}"


def _difference(name: str, by_rank: Sequence[Facts]) -> str | None:
    values = [facts["same"].get(name) for facts in by_rank]
    votes = Counter(values)
    if len(votes) < 2:
        return None
    usual = max(values, key=lambda value: (votes[value], -values.index(value)))
    majority = [rank for rank, value in enumerate(values) if value == usual]
    odd = next(value for value in values if value != usual)
    ranks = [rank for rank, value in enumerate(values) if value == odd]
    nodes = list(dict.fromkeys(by_rank[rank]["node"] for rank in ranks))
    where = f"node {nodes[0]}" if len(nodes) == 1 else f"{len(nodes)} nodes, the first node {nodes[0]}"
    have = "has" if len(ranks) == 1 else "have"
    theirs = "has" if len(majority) == 1 else "have"
    return f"{spans(ranks)} on {where} {have} {name} {_short(odd)}, {spans(majority)} {theirs} {_short(usual)}"


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:12]}..."
