"""Source blocks to Megatron's hybrid layer symbols, with a table that says which became what.

Megatron's symbols (megatron/core/models/hybrid/hybrid_layer_allocation.py, 0.19.2): ``*`` attention, ``+`` MLA,
``D`` DSA, ``-`` MLP, ``E`` MoE, ``M`` Mamba-2, ``G`` GDN; ``|`` separates pipeline segments, ``/`` the depths of
multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from megacpp_stp.errors import UserError
from megacpp_stp.plan.stp import FINAL_NORM, Taps, resolve_taps
from megacpp_stp.recipe.blocks import Attention, Mla, StandIn
from megacpp_stp.recipe.pattern import Block, Pattern, PatternError, parse_pattern
from megacpp_stp.recipe.schema import Recipe

Kind = Literal["attention", "mla", "dsa", "mlp", "moe", "mamba2", "mamba3", "m2rnn"]

SYMBOLS: dict[Kind, str] = {
    "attention": "*",
    "mla": "+",
    "dsa": "D",
    "mlp": "-",
    "moe": "E",
    "mamba2": "M",
    # No symbol of their own: a Mamba slot carries them.
    "mamba3": "M",
    "m2rnn": "M",
}
_SLOT_SEAMS: dict[Kind, str] = {"mamba3": "mamba3 in a Mamba slot", "m2rnn": "m2rnn in a Mamba slot"}
_MTP_LETTERS = "AE"


@dataclass(frozen=True, slots=True)
class Layer:
    """One Megatron layer and where it came from.

    Attributes:
        number: Megatron's layer number, 1-based: global in the decoder, counted from 1 again in each depth of
            multi-token prediction.
        symbol: Its letter in ``--hybrid-layer-pattern``.
        kind: What runs there.
        block: 1-based number of the source block.
        family: The source letter.
        segment: 0-based pipeline segment: ``virtual_stage * pipeline + pipeline_rank``.
        seam: What is special about it, in words (``m2rnn in a Mamba slot``); empty for an exact counterpart.
        tapped: Whether STP reads the hidden states after it.
    """

    number: int
    symbol: str
    kind: Kind
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
        layers: Every layer of the decoder, in order.
        pipeline: Pipeline ranks.
        virtual: Virtual stages a rank.
        stages: Blocks on each segment.
        mtp: The layers of one depth of multi-token prediction, on the last segment.
        mtp_depths: How many depths there are.
        final_norm_tapped: Whether STP reads the hidden states after the final norm too.
    """

    source: str
    layers: tuple[Layer, ...]
    pipeline: int
    virtual: int
    stages: tuple[int, ...]
    mtp: tuple[Layer, ...]
    mtp_depths: int
    final_norm_tapped: bool

    @cached_property
    def segments(self) -> tuple[tuple[Layer, ...], ...]:
        """Layers of each pipeline segment, in order."""
        count = self.pipeline * self.virtual
        return tuple(tuple(layer for layer in self.layers if layer.segment == i) for i in range(count))

    @cached_property
    def megatron_pattern(self) -> str:
        """The value of ``--hybrid-layer-pattern``."""
        depth = "".join(layer.symbol for layer in self.mtp)
        main = "|".join("".join(layer.symbol for layer in segment) for segment in self.segments)
        return "/".join([main, *([depth] * self.mtp_depths)])

    def rank_layers(self, rank: int) -> tuple[Layer, ...]:
        """The decoder's layers on one pipeline rank, over its virtual stages."""
        return tuple(layer for layer in self.layers if layer.segment % self.pipeline == rank)

    def numbers(self, kind: Kind) -> tuple[int, ...]:
        """Layer numbers of one kind in the decoder."""
        return tuple(layer.number for layer in self.layers if layer.kind == kind)

    @property
    def keeps_fp32(self) -> bool:
        """Whether a layer has parameters that stay fp32 in a 16-bit model."""
        return any(layer.kind in _SLOT_SEAMS for layer in self.layers)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The taps in order: layer number and family letter, as ``6:A``, then ``final-norm``."""
        layers = tuple(f"{layer.number}:{layer.family}" for layer in self.layers if layer.tapped)
        return (*layers, FINAL_NORM) if self.final_norm_tapped else layers

    def seams(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Layer numbers without an exact counterpart in Megatron, by source family and what is special."""
        found: dict[tuple[str, str], list[int]] = {}
        for layer in self.layers:
            if layer.seam:
                found.setdefault((layer.family, layer.seam), []).append(layer.number)
        return {seam: tuple(numbers) for seam, numbers in found.items()}

    def stand_ins(self) -> dict[str, tuple[int, ...]]:
        """Layer numbers on which something else runs than the block that the family stands for, by source family."""
        return {family: numbers for (family, seam), numbers in self.seams().items() if seam not in _SLOT_SEAMS.values()}


def lower(recipe: Recipe, *, stages: tuple[int, ...]) -> HybridPlan:
    """Lower a recipe's pattern to Megatron layers on pipeline segments.

    Args:
        recipe: The resolved recipe.
        stages: Blocks on each segment: the recipe's own, or those that `megacpp_stp.plan.stages` chose.

    Raises:
        UserError: Stages that do not fit the depth or the pipeline, DSA on an A block that is not there, letters that
            a depth of multi-token prediction cannot have, or a tap that is no layer.
    """
    pattern = parse_pattern(recipe.model.pattern, depth=recipe.model.depth)
    sparse = _sparse_blocks(recipe, pattern)
    segments = _segments_of_blocks(recipe, stages)
    kinds = {block: tuple(_kinds(recipe, block, sparse=sparse)) for block in pattern.blocks}
    taps = _taps(recipe, kinds)
    layers: list[Layer] = []
    for block in pattern.blocks:
        for kind, seam in kinds[block]:
            layers.append(
                Layer(
                    number=len(layers) + 1,
                    symbol=SYMBOLS[kind],
                    kind=kind,
                    block=block.number,
                    family=block.family,
                    segment=segments[block.number - 1],
                    seam=seam,
                    tapped=len(layers) + 1 in taps.layers,
                )
            )
    return HybridPlan(
        source=str(pattern),
        layers=tuple(layers),
        pipeline=recipe.parallel.pipeline,
        virtual=recipe.parallel.virtual,
        stages=stages,
        mtp=tuple(_mtp_layers(recipe, segment=len(stages) - 1)),
        mtp_depths=recipe.model.mtp.depths if recipe.model.mtp else 0,
        final_norm_tapped=taps.final_norm,
    )


def _kinds(recipe: Recipe, block: Block, *, sparse: frozenset[int]) -> Iterator[tuple[Kind, str]]:
    """The layers that a block becomes, each with what is special about it."""
    spec = getattr(recipe.model.families, block.family)
    assert spec is not None, "the loader has checked that each letter is described"
    if isinstance(spec, StandIn):
        yield "mlp", f"{spec.runs} stands in for {spec.instead_of}"
        return
    kind: Kind = "dsa" if block.number in sparse else spec.block
    yield kind, _SLOT_SEAMS.get(kind, "")
    if isinstance(spec, Mla | Attention) and spec.dense_mlp:
        yield "mlp", ""


def _sparse_blocks(recipe: Recipe, pattern: Pattern) -> frozenset[int]:
    """Numbers of the A blocks that have sparse attention."""
    block = recipe.model.families.A
    if not isinstance(block, Mla) or block.sparse is None:
        return frozenset()
    attention, ranks, field = pattern.positions("A"), block.sparse.ranks, "model.families.A.sparse.ranks"
    if list(ranks) != sorted(set(ranks)):
        raise UserError("must rise and not repeat", field=field, value=list(ranks), fix=f"write {sorted(set(ranks))}")
    if ranks[-1] >= len(attention):
        raise UserError(
            f"rank {ranks[-1]} does not exist: the pattern has {len(attention)} A blocks, counted from 0",
            field=field,
            value=list(ranks),
            fix=f"use numbers from 0 to {len(attention) - 1}",
        )
    return frozenset(attention[rank] for rank in ranks)


def _mtp_layers(recipe: Recipe, *, segment: int) -> Iterator[Layer]:
    """One depth of multi-token prediction. Its attention is never sparse: its numbers begin at 1 again."""
    mtp = recipe.model.mtp
    if mtp is None:
        return
    for position, letter in enumerate(mtp.pattern):
        if letter not in _MTP_LETTERS:
            raise PatternError(
                f"{letter!r} cannot be in a depth of multi-token prediction",
                pattern=mtp.pattern,
                position=position,
                fix="use A and E: a seam is found by its layer number, and those begin at 1 again in each depth",
                field="model.mtp.pattern",
            )
        if getattr(recipe.model.families, letter) is None:
            raise PatternError(
                f"what {letter} is is not said",
                pattern=mtp.pattern,
                position=position,
                fix=f"describe family {letter}, which the main pattern must have too",
                field="model.mtp.pattern",
            )
    number = 0
    for place, letter in enumerate(mtp.pattern):
        block = Block(number=place + 1, family=letter)
        for kind, seam in _kinds(recipe, block, sparse=frozenset()):
            number += 1
            yield Layer(number, SYMBOLS[kind], kind, block.number, letter, segment, seam, tapped=False)


def _taps(recipe: Recipe, kinds: Mapping[Block, Sequence[object]]) -> Taps:
    if recipe.stp is None:
        return Taps((), final_norm=False)
    ends = accumulate(map(len, kinds.values()))
    return resolve_taps(recipe.stp, [(block.family, end) for block, end in zip(kinds, ends, strict=True)])


def _segments_of_blocks(recipe: Recipe, stages: tuple[int, ...]) -> list[int]:
    parallel, depth = recipe.parallel, recipe.model.depth
    wanted = parallel.pipeline * parallel.virtual
    if len(stages) != wanted:
        raise UserError(
            f"needs {wanted} numbers for pipeline {parallel.pipeline} x virtual {parallel.virtual}",
            field="parallel.stages",
            value=list(stages),
            fix=f"give the number of blocks of each of the {wanted} stages, or write auto",
        )
    if sum(stages) != depth:
        raise UserError(
            f"adds up to {sum(stages)}, but model.depth is {depth}",
            field="parallel.stages",
            value=list(stages),
            fix=f"choose numbers that add up to {depth}, or write auto",
        )
    return [segment for segment, blocks in enumerate(stages) for _ in range(blocks)]
