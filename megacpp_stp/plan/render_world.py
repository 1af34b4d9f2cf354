"""Ranks on nodes, and what they send each other, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.flow import Flow
from megacpp_stp.plan.placement import Axis, Placement, place, straddling_fix, straddling_text
from megacpp_stp.plan.traffic import flows

_AXES: tuple[Axis, ...] = ("tensor", "context", "expert", "data", "expert data", "pipeline")
_MOST_NODES = 6
_MIB, _GIB = 2**20, 2**30


def world_sections(plan: RunPlan) -> Iterator[RenderableType]:
    """Placement, warnings and traffic of a plan; nothing for one process."""
    if plan.world_size == 1:
        return
    placement = place(plan.recipe)
    if placement.nodes > 1:
        yield _nodes(placement)
    yield from (Text(text, style="bold red") for text in warnings(placement))
    yield _traffic(placement, flows(plan))
    if missing := [gap.what for gap in plan.gaps if gap.field == "parallel.context"]:
        yield Text(f"not counted: {'; '.join(missing)}")


def warnings(placement: Placement) -> Iterator[str]:
    """What no run should have without meaning it."""
    for axis in placement.straddling():
        yield f"WARNING: {straddling_text(placement, axis)}: {straddling_fix(axis)}"


def _nodes(placement: Placement) -> Table:
    """One row a node; of many nodes the first and the last."""
    title = "ranks on nodes, in Megatron's order: tensor, context, expert, data, pipeline"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("node", justify="right")
    table.add_column("ranks")
    shown = [axis for axis in _AXES if placement.size(axis) > 1]
    for axis in shown:
        table.add_column(axis)
    for node in _picked(placement.nodes):
        if node is None:
            table.add_row("...", *[""] * (len(shown) + 1))
            continue
        ranks = range(node * placement.per_node, (node + 1) * placement.per_node)
        table.add_row(str(node), _span(ranks), *(_span(_places(placement, axis, ranks)) for axis in shown))
    return table


def _picked(nodes: int) -> Sequence[int | None]:
    if nodes <= _MOST_NODES:
        return range(nodes)
    return (*range(_MOST_NODES - 2), None, nodes - 1)


def _places(placement: Placement, axis: Axis, ranks: Iterable[int]) -> set[int]:
    """Coordinates of some ranks on one axis."""
    found = set()
    for rank in ranks:
        grid = placement.experts if axis in ("expert", "expert data") else placement.dense
        found.add(grid.coordinates(rank)[axis])
    return found


def _span(numbers: Iterable[int]) -> str:
    """``0-7``, ``3``, or ``0 8 16`` for what has gaps."""
    found = sorted(numbers)
    if found == list(range(found[0], found[-1] + 1)):
        return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
    return " ".join(map(str, found))


def _traffic(placement: Placement, found: Sequence[Flow]) -> Table:
    title = "sent in one step, at least: by the busiest GPU, and by the busiest node to other nodes"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("groups", "of", "on nodes", "what", "how"):
        table.add_column(name, justify="right" if name in ("of", "on nodes") else "left")
    for name in ("a GPU", "a node"):
        table.add_column(name, justify="right")
    for flow in found:
        nodes = placement.most_nodes(flow.axis)
        network = amount(flow.over_network) if flow.over_network else "none"
        table.add_row(flow.axis, str(flow.size), str(nodes), flow.what, flow.operation, amount(flow.sent), network)
    return table


def amount(size: int) -> str:
    """Bytes in a unit that suits them."""
    if size >= _GIB / 10:
        return f"{size / _GIB:.2f} GiB"
    return f"{size / _MIB:.2f} MiB" if size >= _MIB / 10 else f"{size} B"
