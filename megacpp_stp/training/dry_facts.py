"""What the process that builds ranks tells the process that asked for them (`megacpp_stp.training.dry_build`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from megacpp_stp.plan.placement import Axis

GROUPS: dict[Axis, str] = {
    "tensor": "tp",
    "context": "cp",
    "expert": "ep",
    "tensor and expert": "tp_ep",
    "data": "dp_cp",
    "expert data": "expt_dp",
    "pipeline": "pp",
}
"""The plan's name of a process group to its attribute in Megatron's ProcessGroupCollection."""

BUILT, REFUSED = "megacpp-stp: built: ", "megacpp-stp: not built: "
"""What the lines for the asking process begin with; all others are upstream's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One pipeline segment on one rank.

    Attributes:
        symbols: Megatron's letters of its decoder layers.
        layers: Global number and parameters of each decoder layer.
        others: Parameters outside of the decoder's layers.
    """

    symbols: str
    layers: tuple[tuple[int, int], ...]
    others: int

    @property
    def parameters(self) -> int:
        """Elements on the rank."""
        return self.others + sum(count for _, count in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A rank with its model.

    Attributes:
        rank: Of the world.
        groups: Ranks of each of its process groups, by the names in `GROUPS`.
        chunks: One a virtual stage.
        taps: Layers that STP reads there, by number, or ``final-norm``.
        optimized: Elements that its optimizer steps: with the distributed optimizer, this rank's part of them.
    """

    rank: int
    groups: dict[str, tuple[int, ...]]
    chunks: tuple[Chunk, ...]
    taps: tuple[str, ...]
    optimized: int

    def as_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From what `as_json` gave."""
        data: dict[str, Any] = json.loads(text)
        chunks = (
            Chunk(
                symbols=one["symbols"],
                layers=tuple((number, count) for number, count in one["layers"]),
                others=one["others"],
            )
            for one in data["chunks"]
        )
        return cls(
            rank=data["rank"],
            groups={name: tuple(ranks) for name, ranks in data["groups"].items()},
            chunks=tuple(chunks),
            taps=tuple(data["taps"]),
            optimized=data["optimized"],
        )
