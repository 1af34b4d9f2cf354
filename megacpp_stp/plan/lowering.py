"""Source blocks to Megatron's hybrid layer symbols, with a table that says which became what.

Megatron's symbols (megatron/core/models/hybrid/hybrid_layer_allocation.py, 0.19.2): ``*`` attention, ``+`` MLA,
``D`` DSA, ``-`` MLP, ``E`` MoE, ``M`` Mamba-2, ``G`` GDN; ``|`` separates pipeline segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.pattern import parse_pattern
from megacpp_stp.recipe.schema import Attention, Mla, Moe, Recipe, StandIn

MLP_SYMBOL = "-"
MOE_SYMBOL = "E"
_SYMBOLS: dict[type, str] = {Mla: "+", Attention: "*", Moe: MOE_SYMBOL}


@dataclass(frozen=True, slots=True)
class Layer:
    """One Megatron layer and where it came from.

    Attributes:
        number: Megatron's global layer number, 1-based.
        symbol: Its letter in ``--hybrid-layer-pattern``.
        block: 1-based number of the source block.
        family: The source letter.
        segment: 0-based pipeline segment: ``virtual_stage * pipeline + pipeline_rank``.
        seam: What is special about it, in words (``mlp stands in for mamba3``); empty for an exact counterpart.
        tapped: Whether STP reads the hidden states after it.
    """

    number: int
    symbol: str
    block: int
    family: str
    segment: int
    seam: str
    tapped: bool


@dataclass(frozen=True)
class HybridPlan:
    """The lowered pattern.

    Attributes:
        source: The tiled source pattern.
        layers: Every Megatron layer, in order.
        pipeline: Pipeline ranks.
        virtual: Virtual stages a rank.
    """

    source: str
    layers: tuple[Layer, ...]
    pipeline: int
    virtual: int

    @cached_property
    def segments(self) -> tuple[tuple[Layer, ...], ...]:
        """Layers of each pipeline segment, in order."""
        count = self.pipeline * self.virtual
        return tuple(tuple(layer for layer in self.layers if layer.segment == i) for i in range(count))

    @cached_property
    def megatron_pattern(self) -> str:
        """The value of ``--hybrid-layer-pattern``."""
        return "|".join("".join(layer.symbol for layer in segment) for segment in self.segments)

    def rank_layers(self, rank: int) -> tuple[Layer, ...]:
        """All layers on one pipeline rank, over its virtual stages."""
        return tuple(layer for layer in self.layers if layer.segment % self.pipeline == rank)

    def stand_ins(self) -> dict[str, tuple[int, ...]]:
        """Layer numbers that stand in for another block, by source family."""
        found: dict[str, list[int]] = {}
        for layer in self.layers:
            if layer.seam:
                found.setdefault(layer.family, []).append(layer.number)
        return {family: tuple(numbers) for family, numbers in found.items()}


def lower(recipe: Recipe) -> HybridPlan:
    """Lower a recipe's pattern to Megatron layers on pipeline segments.

    Raises:
        UserError: Stages that do not fit the depth or the pipeline, or a tap that is no layer.
    """
    pattern = parse_pattern(recipe.model.pattern, depth=recipe.model.depth)
    segment_of_block = _segments_of_blocks(recipe)
    taps = set(recipe.stp.taps) if recipe.stp else set()
    layers: list[Layer] = []
    for block in pattern.blocks:
        spec = getattr(recipe.model.families, block.family)
        symbol, seam = _lower_block(spec)
        number = len(layers) + 1
        layers.append(
            Layer(
                number=number,
                symbol=symbol,
                block=block.number,
                family=block.family,
                segment=segment_of_block[block.number - 1],
                seam=seam,
                tapped=number in taps,
            )
        )
    missing = sorted(tap for tap in taps if tap > len(layers))
    if missing:
        raise UserError(
            f"layer {missing[0]} does not exist: the pattern lowers to {len(layers)} layers",
            field="stp.taps",
            value=list(recipe.stp.taps) if recipe.stp else [],
            fix=f"use numbers from 1 to {len(layers)}",
        )
    return HybridPlan(
        source=str(pattern),
        layers=tuple(layers),
        pipeline=recipe.parallel.pipeline,
        virtual=recipe.parallel.virtual,
    )


def _lower_block(spec: object) -> tuple[str, str]:
    if isinstance(spec, StandIn):
        return MLP_SYMBOL, f"{spec.runs} stands in for {spec.instead_of}"
    return _SYMBOLS[type(spec)], ""


def _segments_of_blocks(recipe: Recipe) -> list[int]:
    parallel, depth = recipe.parallel, recipe.model.depth
    wanted = parallel.pipeline * parallel.virtual
    if len(parallel.stages) != wanted:
        raise UserError(
            f"needs {wanted} numbers for pipeline {parallel.pipeline} x virtual {parallel.virtual}",
            field="parallel.stages",
            value=list(parallel.stages),
            fix=f"give the number of blocks of each of the {wanted} stages",
        )
    if sum(parallel.stages) != depth:
        raise UserError(
            f"adds up to {sum(parallel.stages)}, but model.depth is {depth}",
            field="parallel.stages",
            value=list(parallel.stages),
            fix=f"choose numbers that add up to {depth}",
        )
    return [segment for segment, blocks in enumerate(parallel.stages) for _ in range(blocks)]
