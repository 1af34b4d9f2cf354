"""``memory``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from megacpp_stp.cli.options import RecipeArgument, SetOption, print_json
from megacpp_stp.cli.plan import Device
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from megacpp_stp.plan.cost import Cost


_WIDTH = 1000
"""Columns: more than any table has, so that no number is cut where a terminal is narrow."""


class MemoryFormat(StrEnum):
    """Forms of the report."""

    TABLE = "table"
    JSON = "json"


def memory_command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    device: Annotated[Device, typer.Option(help="What the ranks run on; cuda is held against an H200.")] = Device.CUDA,
    format: Annotated[MemoryFormat, typer.Option("--format", help="table or json.")] = MemoryFormat.TABLE,
) -> None:
    """Show what a recipe costs: parameters, FLOPs a token, memory a GPU by pipeline rank. Needs no torch."""
    from megacpp_stp.plan.cost import cost_of

    cost = cost_of(build_plan(load_recipe(recipe, set_ or ()), device=device.value))
    if format is MemoryFormat.JSON:
        print_json(cost.as_dict())
        return
    from rich.console import Console

    console = Console(highlight=False, width=_WIDTH)
    console.print(f"{cost.plan.recipe.name}: {cost.plan.recipe.title}", style="bold", markup=False)
    for title, table in (
        ("parameters and FLOPs a token", _families(cost)),
        ("stages: largest over mean cost, 1 is perfect", _stages(cost)),
        ("memory a GPU by pipeline rank, MiB", _memory(cost)),
    ):
        console.print(title, style="italic")
        console.print(table)
    for line in _remarks(cost):
        console.print(line, markup=False)


def _table(*columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns are words and whose others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right")
    return table


def _families(cost: Cost) -> Table:
    table = _table("family", "layers", "parameters", "active", "forward", "training")
    flops = cost.flops_by_family
    for family, found in cost.parameters_by_family.items():
        layers = sum(part.family == family and bool(part.symbol) for part in cost.parts)
        spent = flops[family]
        table.add_row(
            family,
            str(layers or ""),
            f"{found.total:,}",
            f"{found.active:,}",
            f"{spent.forward:,}",
            f"{spent.training:,}",
        )
    table.add_row(
        "total",
        str(sum(bool(part.symbol) for part in cost.parts)),
        f"{cost.parameters.total:,}",
        f"{cost.parameters.active:,}",
        f"{cost.flops.forward:,}",
        f"{cost.flops.training:,}",
        style="bold",
    )
    return table


def _stages(cost: Cost) -> Table:
    table = _table("cut", "imbalance", "blocks", "")
    names = {"recipe": "this recipe's", "best": "best", "equal": "equal blocks"}
    for name, cut in cost.cuts.items():
        remark = "" if cut.runs else "would not run: a pipeline rank lacks a kind of block that it needs"
        table.add_row(names[name], f"{cut.imbalance:.4f}", " ".join(map(str, cut.stages)), remark)
    return table


def _memory(cost: Cost) -> Table:
    """One column a pipeline rank."""
    ranks = cost.ranks
    table = _table("", "how sure", *(f"rank {memory.rank}" for memory in ranks), words=2)
    names = {row.name: row for memory in ranks for row in memory.rows}
    for name, example in names.items():
        amounts = ({row.name: row.bytes for row in memory.rows}.get(name, 0) for memory in ranks)
        sure = "exact" if example.exact else "estimated"
        table.add_row(name, sure, *(_mib(amount) for amount in amounts))
    table.add_row("peak", "estimated", *(_mib(memory.peak_bytes) for memory in ranks), style="bold")
    table.add_row("microbatches held", "exact", *(" ".join(map(str, memory.in_flight)) for memory in ranks))
    table.add_row("parameters held", "exact", *(f"{memory.elements:,}" for memory in ranks))
    return table


def _mib(amount: int) -> str:
    return f"{amount / 2**20:,.1f}"


def _remarks(cost: Cost) -> Iterator[str]:
    from megacpp_stp.plan.memory import GIB

    notes = {row.name: row.note for memory in cost.ranks for row in memory.rows}
    width = max(map(len, notes))
    yield from (f"  {name:{width}}  {note}" for name, note in notes.items())
    yield f"  {'peak':{width}}  {_sum_of_peak(cost)}"
    yield f"  {'microbatches':{width}}  of each virtual stage at the peak"
    if cost.capacity_bytes is None:
        yield "not held against a capacity: the plan runs on a CPU"
    else:
        worst = max(cost.ranks, key=lambda memory: memory.peak_bytes)
        left = cost.capacity_bytes - worst.peak_bytes
        rest = f"{left / GIB:.1f} GiB left for what is not modelled" if left >= 0 else f"{-left / GIB:.1f} GiB too much"
        yield (
            f"{'fits' if left >= 0 else 'does not fit'}: at most {worst.peak_bytes / GIB:.1f} GiB (pipeline rank "
            f"{worst.rank}) of {cost.capacity_bytes / GIB:.1f} GiB; {rest}"
        )
        if left < 0:
            largest = worst.largest
            yield f"the largest row of pipeline rank {worst.rank} is {largest.name}: {largest.bytes / GIB:.2f} GiB"
    yield "not modelled: CUDA context, NCCL, other temporary buffers, allocator fragmentation; see docs/memory.md"


def _sum_of_peak(cost: Cost) -> str:
    """Which rows the peak is the sum of, by name."""
    phases = {row.name: row.phase for memory in cost.ranks for row in memory.rows}
    always, passes, step = (
        ", ".join(name for name, found in phases.items() if found == phase) for phase in ("always", "passes", "step")
    )
    return f"{always}; and the larger of ({step}) and ({passes}), which never meet"
