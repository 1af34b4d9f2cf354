"""Which rank does what, and on which node: Megatron's process groups without Megatron.

Ranks are numbered in Megatron's default order ``tp-cp-ep-dp-pp``, tensor fastest (``parallel_state.py`` of
megatron-core 0.19.2, ``initialize_model_parallel`` and ``RankGenerator``): once for the layers without experts, where
the expert axis has size 1, and once for experts, where the context axis has.  torchrun gives each node the ranks that
follow those of the node before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megacpp_stp.plan.checks import data_parallel_size
from megacpp_stp.recipe.schema import Recipe

Axis = Literal["tensor", "context", "expert", "tensor and expert", "data", "expert data", "pipeline"]
INSIDE: tuple[Axis, ...] = ("tensor", "expert")
"""Axes that exchange something in each layer, and belong inside a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Ranks as the points of a grid.

    Attributes:
        sizes: Of each axis, the fastest first.
    """

    sizes: Mapping[str, int]

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return math.prod(self.sizes.values())

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank is on each axis."""
        found = {}
        for axis, size in self.sizes.items():
            rank, found[axis] = divmod(rank, size)
        return found

    def groups(self, axes: tuple[str, ...]) -> list[list[int]]:
        """The ranks that differ on some axes alone: each group ascending, the groups by their first rank."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = self.coordinates(rank)
            found.setdefault(tuple(place[axis] for axis in place if axis not in axes), []).append(rank)
        return list(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The ranks of a run on its nodes.

    Attributes:
        dense: Grid of the layers without experts: tensor, context, data, pipeline.
        experts: Grid of experts: tensor, expert, expert data, pipeline.
        per_node: Ranks of each node.
    """

    dense: Grid
    experts: Grid
    per_node: int

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.per_node

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.dense.world // self.per_node

    def size(self, axis: Axis) -> int:
        """Ranks of each group of an axis."""
        grid, axes = self._place(axis)
        return math.prod(grid.sizes[one] for one in axes)

    def groups(self, axis: Axis) -> list[list[int]]:
        """The process groups of an axis."""
        grid, axes = self._place(axis)
        return grid.groups(axes)

    def _place(self, axis: Axis) -> tuple[Grid, tuple[str, ...]]:
        """Its grid, and the axes of that. Gradients without experts are reduced over data and context together."""
        if axis == "data":
            return self.dense, ("context", "data")
        if axis == "tensor and expert":
            return self.experts, ("tensor", "expert")
        return (self.experts if axis in ("expert", "expert data") else self.dense), (axis,)

    def most_nodes(self, axis: Axis) -> int:
        """Over how many nodes a group of an axis reaches, at most."""
        return max(len({self.node_of(rank) for rank in group}) for group in self.groups(axis))

    def straddling(self) -> Iterator[Axis]:
        """The axes that belong inside a node and reach over several."""
        yield from (axis for axis in INSIDE if self.size(axis) > 1 and self.most_nodes(axis) > 1)


def straddling_text(placement: Placement, axis: Axis) -> str:
    """What is wrong with groups of an axis that reach over several nodes."""
    return (
        f"{axis} parallelism exchanges something in every layer, and its groups of {placement.size(axis)} "
        f"reach over {placement.most_nodes(axis)} nodes of {placement.per_node} processes"
    )


def straddling_fix(axis: Axis) -> str:
    """How to mend it."""
    return f"use a smaller parallel.{axis}, or sizes whose product fits a node"


def place(recipe: Recipe) -> Placement:
    """Where the ranks of a recipe are.

    Raises:
        UserError: The world does not divide into the parallel sizes.
    """
    parallel, launch = recipe.parallel, recipe.launch
    world = launch.nodes * launch.processes_per_node
    dense = {
        "tensor": parallel.tensor,
        "context": parallel.context,
        "data": data_parallel_size(recipe),
        "pipeline": parallel.pipeline,
    }
    experts = {
        "tensor": parallel.tensor,  # Megatron's default expert-tensor size
        "expert": parallel.expert,
        "expert data": world // (parallel.tensor * parallel.expert * parallel.pipeline),
        "pipeline": parallel.pipeline,
    }
    return Placement(dense=Grid(sizes=dense), experts=Grid(sizes=experts), per_node=launch.processes_per_node)
