"""What a part keeps between its forward and its backward pass: the units that `megacpp_stp.plan.activations` counts in.

All sizes are bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megacpp_stp.recipe.schema import Model, Parallel, Recipe

FP32, INT32, INT64, BOOL = 4, 4, 8, 1
COMPUTE_BYTES = {"fp32": FP32, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes a token, by how tensor parallelism divides them.

    Attributes:
        sequence: Cut over tensor-parallel ranks under sequence parallelism; else each of them has it.
        tensor: Cut over tensor-parallel ranks: heads, channels, hidden widths, the vocabulary.
        whole: On each tensor-parallel rank.
    """

    sequence: int = 0
    tensor: int = 0
    whole: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            sequence=self.sequence + other.sequence,
            tensor=self.tensor + other.tensor,
            whole=self.whole + other.whole,
        )

    def on_gpu(self, parallel: Parallel) -> int:
        """Bytes on one GPU for each token of its context-parallel shard, rounded up."""
        sequence = parallel.tensor if parallel.sequence_parallel else 1
        return -(-self.sequence // sequence) - (-self.tensor // parallel.tensor) + self.whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one token leaves in one part.

    Attributes:
        layer: What is in no other field.
        dispatch: Mixture of experts: the routed copies of the token, their places and probabilities.
        scores: Sparse attention: scores and masks of all heads and keys, which its plain path keeps whole.
        logits: Output heads: the fp32 softmax that cross entropy keeps, and the logits in the compute dtype, which
            are alive beside it in forward (as is their gradient in backward).
    """

    layer: Bytes = Bytes()
    dispatch: Bytes = Bytes()
    scores: Bytes = Bytes()
    logits: Bytes = Bytes()

    def on_gpu(self, parallel: Parallel) -> dict[str, int]:
        """Bytes on one GPU, by field."""
        return {field.name: getattr(self, field.name).on_gpu(parallel) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """What one token takes of sparse attention's scores, kept ones included, while its passes run.

    Attributes:
        attention: At the peak of the attention itself.
        indexer: At each peak of the indexer and its loss, which run before the attention in forward and behind it in
            backward, when its scores are not there.
    """

    attention: Bytes = Bytes()
    indexer: tuple[Bytes, ...] = ()

    def on_gpu(self, parallel: Parallel) -> tuple[int, int]:
        """Bytes on one GPU at the peak of the attention, and at the highest of the indexer."""
        highest = max((one.on_gpu(parallel) for one in self.indexer), default=0)
        return self.attention.on_gpu(parallel), highest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the bytes depend on besides the layer.

    Attributes:
        recipe: The recipe.
        modules: What is computed again instead of being kept; names as in `training.recompute.modules`.
    """

    recipe: Recipe
    modules: frozenset[str]

    @property
    def model(self) -> Model:
        """The network."""
        return self.recipe.model

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return COMPUTE_BYTES[self.recipe.training.precision]

    @property
    def fused(self) -> bool:
        """Whether norms and gated activations are Transformer Engine's and Megatron's fused kernels."""
        return self.model.backend == "te"

    def norm(self, width: int, *, output: bool = True, again: bool = False) -> int:
        """A norm over `width` channels.

        The torch backend keeps its input and its normalised form in fp32 and the root; a fused kernel the input in the
        compute dtype and the root. The next product keeps the output. Computed again, it leaves its input alone.
        """
        if again:
            return self.element * width
        inside = self.element * width if self.fused else 2 * FP32 * width
        return inside + FP32 + (self.element * width if output else 0)
