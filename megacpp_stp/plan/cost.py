"""What a plan costs: parameters, FLOPs a token, balance of its stages, memory a GPU by pipeline rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megacpp_stp.plan import flops
from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.cuts import equal_stages, imbalance, stage_costs
from megacpp_stp.plan.flops import Flops, costs_of_blocks, part_flops
from megacpp_stp.plan.memory import H200_BYTES, RankMemory, rank_memories
from megacpp_stp.plan.parameters import Count, Part, by_family, count, of_rank, parts
from megacpp_stp.plan.stages import cut_report

COST_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One way to cut the blocks into stages, and its price.

    Attributes:
        stages: Blocks on each segment.
        costs: Training FLOPs a token of each segment, output head included.
        imbalance: Largest over mean cost.
        runs: Whether each pipeline rank has a block of every kind that it needs.
    """

    stages: tuple[int, ...]
    costs: tuple[int, ...]
    imbalance: float
    runs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a plan costs.

    Attributes:
        plan: The plan.
        parts: Everything with parameters.
        cuts: The recipe's cut (``recipe``), the best one (``best``) and equal numbers of blocks (``equal``).
        ranks: Memory of one GPU of each pipeline rank.
        capacity_bytes: Of the GPU; None for a plan that runs on a CPU.
    """

    plan: RunPlan
    parts: tuple[Part, ...]
    cuts: dict[str, Cut]
    ranks: tuple[RankMemory, ...]
    capacity_bytes: int | None

    @property
    def parameters(self) -> Count:
        """Of the whole model."""
        return count(self.parts)

    @property
    def parameters_by_family(self) -> dict[str, Count]:
        """By source letter, and embedding and output."""
        return by_family(self.parts)

    @property
    def flops(self) -> Flops:
        """Of the whole model."""
        return flops.total(self.plan.recipe, self.parts)

    @property
    def flops_by_family(self) -> dict[str, Flops]:
        """By source letter, and embedding and output."""
        return flops.by_family(self.plan.recipe, self.parts)

    def of_rank(self, rank: int) -> Count:
        """Parameters that a pipeline rank owns, over its tensor- and expert-parallel GPUs."""
        return count(of_rank(self.parts, rank=rank, pipeline=self.plan.layout.pipeline))

    def fits(self, rank: int) -> bool | None:
        """Whether a rank's estimate is within the GPU; None without a GPU."""
        left = self.left_bytes(rank)
        return None if left is None else left >= 0

    def left_bytes(self, rank: int) -> int | None:
        """What the estimate leaves of a rank's GPU for what is not modelled; negative where it does not fit."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.ranks[rank].peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain data with stable names: what ``--format json`` prints."""
        return {
            "cost_format": COST_FORMAT,
            "recipe": self.plan.recipe.name,
            "provenance": self.plan.recipe.provenance,
            "device": self.plan.device,
            "digest": self.plan.digest,
            "parameters": {
                **asdict(self.parameters),
                "by_family": {family: asdict(found) for family, found in self.parameters_by_family.items()},
            },
            "flops_per_token": {
                **_flops(self.flops),
                "by_family": {family: _flops(found) for family, found in self.flops_by_family.items()},
            },
            "parts": [self._part(part) for part in self.parts],
            "cuts": {name: asdict(cut) for name, cut in self.cuts.items()},
            "capacity_bytes": self.capacity_bytes,
            "ranks": [self._rank(memory) for memory in self.ranks],
        }

    def _part(self, part: Part) -> dict[str, Any]:
        return {
            "name": part.name,
            "family": part.family,
            "kind": part.kind,
            "symbol": part.symbol,
            "segment": part.segment,
            "parameters": part.total,
            "active_parameters": part.active,
            "flops_per_token": _flops(part_flops(self.plan.recipe, part)),
        }

    def _rank(self, memory: RankMemory) -> dict[str, Any]:
        owned = self.of_rank(memory.rank)
        return {
            "rank": memory.rank,
            "parameters": owned.total,
            "active_parameters": owned.active,
            "parameters_on_gpu": memory.elements,
            "in_flight": list(memory.in_flight),
            "rows": [asdict(row) for row in memory.rows],
            "peak_bytes": memory.peak_bytes,
            "fits": self.fits(memory.rank),
            "left_bytes": self.left_bytes(memory.rank),
            "largest_row": memory.largest.name,
        }


def cost_of(plan: RunPlan) -> Cost:
    """Count and estimate everything about a plan.

    Args:
        plan: From `megacpp_stp.build_plan`; one for ``cpu`` is held against no capacity.
    """
    chosen = parts(plan.recipe, plan.layout)
    return Cost(
        plan=plan,
        parts=chosen,
        cuts=_cuts(plan, chosen),
        ranks=rank_memories(plan.recipe, plan.layout, chosen),
        capacity_bytes=H200_BYTES if plan.device == "cuda" else None,
    )


def _cuts(plan: RunPlan, chosen: tuple[Part, ...]) -> dict[str, Cut]:
    costs, report = costs_of_blocks(plan.recipe, chosen), cut_report(plan.recipe, plan.layout)
    found = {
        "recipe": (report.stages, True),
        "best": (report.best_stages, True),
        "equal": (equal_stages(len(costs), segments=len(report.stages)), report.equal_stages is not None),
    }
    return {
        name: Cut(stages=stages, costs=stage_costs(costs, stages), imbalance=imbalance(costs, stages), runs=runs)
        for name, (stages, runs) in found.items()
        if stages is not None
    }


def _flops(found: Flops) -> dict[str, int]:
    return {
        "matrices": found.matrices,
        "attention": found.attention,
        "recurrence": found.recurrence,
        "forward": found.forward,
        "training": found.training,
    }
