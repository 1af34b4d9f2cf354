"""Everything of a model that has parameters, part by part, and how they spread over the pipeline.

Counts are exact: `tests/parity/test_parameter_count.py` builds the models and compares.

Legend: h hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megacpp_stp.plan.layers import layer_weights, prediction_weights
from megacpp_stp.plan.lowering import HybridPlan, Kind
from megacpp_stp.plan.weight import Weight, matrix, vector
from megacpp_stp.recipe.schema import Recipe

VOCAB_MULTIPLE = 128
"""Megatron's default of ``--make-vocab-size-divisible-by``, which no recipe changes."""

EMBEDDING, OUTPUT, MTP = "embedding", "output", "mtp"

PartKind = Kind | Literal["embedding", "output", "mtp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What lies on one pipeline segment as a whole: the embedding, a layer, a depth of prediction, or the output.

    Attributes:
        name: ``embedding``, ``layer 3``, ``mtp 1``, ``mtp 1 layer 2``, ``output``.
        family: The layer's source letter; ``embedding``, ``mtp`` or ``output`` outside the blocks.
        kind: What it is: of a layer what runs there; ``mtp`` is a depth without its layers, with its output head.
        symbol: Megatron's letter; empty for what is no layer.
        layer: Global layer number from 1; None outside the blocks.
        block: Source block number from 1; None outside the blocks.
        segment: Pipeline segment from 0.
        weights: Its parameters.
        copies: Elements it stores of weights that another segment owns: the embedding of a tied output layer or of
            multi-token prediction, when the two are on different segments.
    """

    name: str
    family: str
    kind: PartKind
    symbol: str
    layer: int | None
    block: int | None
    segment: int
    weights: tuple[Weight, ...]
    copies: tuple[Weight, ...] = ()

    @property
    def total(self) -> int:
        """Elements, without copies."""
        return sum(weight.count for weight in self.weights)

    @property
    def active(self) -> int:
        """Elements that one token meets, without copies."""
        return sum(weight.active for weight in self.weights)

    def home(self, depth: int) -> int:
        """The block, numbered from 1 to `depth`, on whose segment it is in every cut."""
        if self.block is not None:
            return self.block
        return 1 if self.kind == EMBEDDING else depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameters of a family, a rank or a model: all of them, and those that one token meets."""

    total: int
    active: int


def padded_vocab_size(recipe: Recipe) -> int:
    """Rows of the embedding: the vocabulary rounded up as megatron/training/vocab_utils.py does."""
    multiple = VOCAB_MULTIPLE * recipe.parallel.tensor
    return -(-recipe.model.vocab_size // multiple) * multiple


def parts(recipe: Recipe, layout: HybridPlan) -> tuple[Part, ...]:
    """Everything with parameters, from the embedding to the output.

    Args:
        recipe: The resolved recipe.
        layout: Its lowering; says which layer lies on which segment.
    """
    model = recipe.model
    kinds = dict.fromkeys(layer.kind for layer in (*layout.layers, *layout.mtp))
    weights = {kind: layer_weights(model, kind) for kind in kinds}
    embedding = Part(
        name=EMBEDDING,
        family=EMBEDDING,
        kind="embedding",
        symbol="",
        layer=None,
        block=None,
        segment=0,
        weights=(_embedding(recipe),),
    )
    layers = (
        Part(
            name=f"layer {layer.number}",
            family=layer.family,
            kind=layer.kind,
            symbol=layer.symbol,
            layer=layer.number,
            block=layer.block,
            segment=layer.segment,
            weights=weights[layer.kind],
        )
        for layer in layout.layers
    )
    return (embedding, *layers, *_predictions(recipe, layout, weights), _output(recipe, layout))


def count(chosen: tuple[Part, ...]) -> Count:
    """The parameters of some parts, copies left out."""
    return Count(total=sum(part.total for part in chosen), active=sum(part.active for part in chosen))


def by_family(chosen: tuple[Part, ...]) -> dict[str, Count]:
    """Parameters of each family that occurs, in order of first occurrence."""
    families = dict.fromkeys(part.family for part in chosen)
    return {family: count(tuple(part for part in chosen if part.family == family)) for family in families}


def of_rank(chosen: tuple[Part, ...], *, rank: int, pipeline: int) -> tuple[Part, ...]:
    """The parts on one pipeline rank, over its virtual stages."""
    return tuple(part for part in chosen if part.segment % pipeline == rank)


def _embedding(recipe: Recipe) -> Weight:
    return vector("embedding.word_embeddings", padded_vocab_size(recipe) * recipe.model.hidden_size, split="tensor")


def _output(recipe: Recipe, layout: HybridPlan) -> Part:
    """Final norm and output layer."""
    model, last = recipe.model, len(layout.stages) - 1
    head = matrix("output_layer", padded_vocab_size(recipe) * model.hidden_size, split="tensor")
    final_norm = vector("decoder.final_norm", model.hidden_size)
    return Part(
        name=OUTPUT,
        family=OUTPUT,
        kind="output",
        symbol="",
        layer=None,
        block=None,
        segment=last,
        weights=(final_norm,) if model.tie_embeddings else (final_norm, head),
        # Upstream keeps a second, synchronised copy unless one model chunk has both ends. Beside multi-token
        # prediction, which has a copy of its own there, this one is allocated and never used.
        copies=(head,) if model.tie_embeddings and last > 0 else (),
    )


def _predictions(recipe: Recipe, layout: HybridPlan, weights: dict[Kind, tuple[Weight, ...]]) -> Iterator[Part]:
    """Multi-token prediction, on the last segment: each depth and its layers. All depths share one embedding copy."""
    last = len(layout.stages) - 1
    for depth in range(1, layout.mtp_depths + 1):
        yield Part(
            name=f"{MTP} {depth}",
            family=MTP,
            kind="mtp",
            symbol="",
            layer=None,
            block=None,
            segment=last,
            weights=prediction_weights(recipe.model),
            copies=(_embedding(recipe),) if depth == 1 and last > 0 else (),
        )
        for layer in layout.mtp:
            yield Part(
                name=f"{MTP} {depth} layer {layer.number}",
                family=MTP,
                kind=layer.kind,
                symbol=layer.symbol,
                layer=None,
                block=None,
                segment=last,
                weights=weights[layer.kind],
            )
