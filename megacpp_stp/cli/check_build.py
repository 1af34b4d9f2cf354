"""``check --build``: the model as ranks of the recipe's world build it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from megacpp_stp.cli.options import console
from megacpp_stp.plan import RunPlan, build_plan
from megacpp_stp.recipe import load_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from megacpp_stp.training.dry_build import RankReport


class StandIn(StrEnum):
    """Backends that ``--build`` can build in another's place."""

    TORCH = "torch"


class Build:
    """A build of some ranks, for a terminal or as plain data.

    Args:
        plan: Of the recipe as it is.
        recipe: Its name or file.
        overrides: As given with ``--set``.
        ranks: To build; both ends of each pipeline stage when there are none.
        backend: To build in the place of the recipe's own; None for that.

    Raises:
        UserError: See `megacpp_stp.training.dry_build.require_request`.
    """

    def __init__(
        self, plan: RunPlan, recipe: str, overrides: Sequence[str], *, ranks: Sequence[int], backend: StandIn | None
    ) -> None:
        from megacpp_stp.training.dry_backend import on_torch
        from megacpp_stp.training.dry_build import require_request

        self._changes = on_torch(plan.recipe) if backend is StandIn.TORCH else ()
        if self._changes:
            changed = load_recipe(recipe, (*overrides, *(change.override for change in self._changes)))
            plan = build_plan(changed, device=plan.device)
        require_request(plan, ranks)
        self._plan, self._ranks = plan, ranks
        self._reports: list[RankReport] = []

    def run(self) -> None:
        """Build them, in a process of their own."""
        from megacpp_stp.training.dry_build import dry_build

        self._reports = dry_build(self._plan, self._ranks)

    @property
    def apart(self) -> int:
        """How many ranks are not as planned."""
        return sum(bool(report.differences) for report in self._reports)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "world_size": self._plan.world_size,
            "as_planned": not self.apart,
            "changed": [asdict(change) for change in self._changes],
            "ranks": [asdict(report) for report in self._reports],
        }

    def print(self) -> None:
        """A table for people, then what is not as planned, then what was changed."""
        out, count = console(), len(self._reports)
        out.print(self._table())
        for report in self._reports:
            for difference in report.differences:
                print(f"rank {report.rank}: {difference}")
        for change in self._changes:
            print(f"not what the recipe says: {change}")
        if self._changes:
            print("so this is the layout with torch modules; nothing is said of Transformer Engine's")
        verdict = f"{self.apart} of {count} ranks are not as planned" if self.apart else f"{count} ranks are as planned"
        out.print(f"{self._plan.recipe.name}: {verdict}: groups, layers, parameters, taps")

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = f"\nranks of {self._plan.world_size}, built without their peers and without memory"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        axes = tuple(self._reports[0].place)
        for number in ("rank", "node", *axes):
            table.add_column(number, justify="right")
        table.add_column("layers")
        for number in ("parameters", "optimized"):
            table.add_column(number, justify="right")
        for text in ("taps", ""):
            table.add_column(text)
        for report in self._reports:
            table.add_row(
                str(report.rank),
                str(report.node),
                *(str(report.place[axis]) for axis in axes),
                ", ".join(f"{first}-{last}" for first, last in report.layers) or "none",
                f"{report.built:,}",
                f"{report.optimized:,}",
                " ".join(report.taps) or "none",
                Text("not as planned", style="red") if report.differences else "as planned",
            )
        return table
