"""The typed form of a recipe file. Every key is listed here and in `blocks`; an unknown one is an error."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacpp_stp.recipe.blocks import (
    Attention,
    Families,
    M2rnn,
    Mamba2,
    Mamba3,
    Mla,
    Moe,
    Router,
    Sparse,
    StandIn,
)
from megacpp_stp.recipe.section import NonNegative, Positive, Rate, Section

__all__ = [
    "Attention",
    "Families",
    "LastOfFamily",
    "M2rnn",
    "Mamba2",
    "Mamba3",
    "Mla",
    "Moe",
    "Mtp",
    "Recipe",
    "Router",
    "Sparse",
    "StandIn",
]

OptionName = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
OptionText = Annotated[str, Field(pattern=r"^[^\x00-\x1f-][^\x00-\x1f]*$")]
OptionValue = bool | int | float | OptionText | tuple[int | float | OptionText, ...]
VariableName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
VariableText = Annotated[str, Field(pattern=r"^[^\x00-\x1f]*$")]
Iterations = Annotated[int, Field(gt=0, lt=2**31)]


class Rope(Section):
    """Rotary position embedding."""

    base: Positive


class Mtp(Section):
    """Multi-token prediction: depths after the last layer, each predicting one token further. Off by default."""

    depths: Positive
    """How many tokens further."""
    pattern: Annotated[str, Field(pattern=r"^[A-Z]+$")]
    """Blocks of one depth, in letters A and E."""
    loss_coeff: Annotated[float, Field(gt=0.0)]
    """Factor of the mean loss over the depths."""


class Model(Section):
    """The network."""

    pattern: str
    """One period of source letters (A M E R)."""
    depth: Annotated[int, Field(gt=0, le=10_000)]
    """Number of blocks; the pattern is tiled to it."""
    hidden_size: Positive
    ffn_hidden_size: Positive
    """Hidden width of dense MLP layers."""
    heads: Positive
    """Attention heads."""
    vocab_size: Positive
    """Vocabulary of the tokenizer, before Megatron pads it."""
    activation: Literal["squared-relu", "swiglu", "gelu"]
    """Of dense MLPs and experts."""
    norm_epsilon: Annotated[float, Field(gt=0.0)]
    init_std: Annotated[float, Field(gt=0.0)]
    tie_embeddings: bool
    rope: Rope
    families: Families
    mtp: Mtp | None
    """null: no multi-token prediction."""
    backend: Literal["torch", "te"]
    """Whose modules: "te" is Transformer Engine's, for production; "torch" needs none of it and runs on CPU and GPU."""


class LastOfFamily(Section):
    """The last blocks of one family; each is read after its last layer."""

    family: Literal["A", "E", "M", "R"]
    last: Positive
    """How many blocks, counted from the end of the pattern."""


class Stp(Section):
    """Semantic Tube Prediction, the trajectory-straightness loss."""

    objective: Literal["triple", "chord"]
    """triple: 1 - cos of two neighbouring steps. chord: a patch of the path against all that is before and after it."""
    weight: Rate
    """Factor of the mean STP loss over all taps. 0 measures without training on it."""
    n_spans: Positive
    """Triples a sequence and tap; patches for chord."""
    max_span: Annotated[int, Field(ge=2, lt=2**53)] | None
    """Longest distance from the first to the last position of a triple; null for the whole sequence."""
    within_documents: bool
    """Whether spans stay inside one document of a packed sequence."""
    start_step: Annotated[int, Field(ge=0, lt=2**32)]
    """First iteration (counted from 0) whose gradient has the STP term; before it STP is only measured."""
    ramp_steps: Annotated[int, Field(ge=0, lt=2**32)]
    """Iterations over which the weight rises, linearly, once the gate is open; 0 for the whole weight at once."""
    taps: Annotated[tuple[Positive | Literal["final", "final-norm"] | LastOfFamily, ...], Field(min_length=1)]
    """Where hidden states are read: after global Megatron layer numbers (1-based), `final` for after the last layer,
    `final-norm` for after the final norm, `{family: A, last: 3}` for after the last blocks of a family."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Key of the triple sampler; Megatron's random streams are not touched."""
    diagnose_every: NonNegative
    """Iterations between two measurements of effective rank, clock share and gradient share; 0 for none."""


class Parallel(Section):
    """Sizes of the parallel groups. The data-parallel size follows from the world size."""

    tensor: Positive
    pipeline: Positive
    virtual: Positive
    """Virtual stages a pipeline rank; 1 for none."""
    context: Positive
    expert: Positive
    sequence_parallel: bool
    stages: tuple[Positive, ...] | Literal["auto"]
    """Blocks on each stage, in order: pipeline x virtual numbers that add up to model.depth; or auto: the best cut."""


class Recompute(Section):
    """Activations that are computed again in the backward pass instead of being kept."""

    granularity: Literal["selective", "full"]
    """selective: inside the listed modules; full: whole layers."""
    modules: tuple[Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"], ...]
    """For selective: Megatron's names. Empty for full."""


class Checkpoint(Section):
    """What a run saves of itself, to go on from after it was stopped."""

    interval: Positive
    """Iterations between two checkpoints. The end of the run is saved in any case."""
    keep_every: Positive | None
    """Iterations between checkpoints that stay; each other one is deleted once the next is whole. null: all stay."""


class Health(Section):
    """What ends a run while it runs."""

    nonfinite: Literal["stop", "skip"]
    """What follows a loss, an STP loss or a gradient that is not finite: stop ends the run, skip drops the step."""
    most_skipped: Positive | None
    """For skip: so many steps in a row may be dropped, one more ends the run. null for stop."""
    hang_minutes: Annotated[float, Field(gt=0.0, le=10_080.0)]
    """Minutes without progress after which each rank says where it waits, and the run is ended."""


class LossScale(Section):
    """Dynamic scaling of the loss, so that fp16 gradients do not vanish; the optimizer takes it out again."""

    initial: Annotated[float, Field(ge=1.0)]
    """What it begins with."""
    minimum: Annotated[float, Field(ge=1.0)]
    """Where it stops falling."""
    window: Positive
    """Steps without an overflow after which it doubles."""
    hysteresis: Positive
    """Overflows, each of which skips its step, until it halves."""


class Fp8(Section):
    """Matrix products in fp8, by Transformer Engine; weights, norms, recurrences and the output layer stay bf16."""

    format: Literal["hybrid", "e4m3"]
    """hybrid: e4m3 forward, e5m2 for gradients."""
    scaling: Literal["tensorwise", "delayed", "blockwise"]
    """Whence an operand's factor comes: its own largest value, those of earlier steps, or one for each block."""
    amax_history: Positive | None
    """Steps that delayed scaling looks back; null for the others."""
    families: Annotated[tuple[Literal["A", "E", "M", "R"], ...], Field(min_length=1)]
    """Letters whose products are in fp8; those of the others stay bf16."""


class Training(Section):
    """The loop."""

    iterations: Iterations
    sequence_length: Annotated[int, Field(ge=3)]
    micro_batch_size: Positive
    global_batch_size: Positive
    seed: Annotated[int, Field(gt=0, lt=2**31)]
    precision: Literal["fp32", "bf16", "fp16"]
    fp8: Fp8 | None
    """On top of bf16, with backend te; null for none."""
    loss_scale: LossScale | None
    """For fp16 alone; null otherwise."""
    log_interval: Positive
    eval_interval: Positive
    eval_iterations: NonNegative
    """Batches an evaluation; 0 for none."""
    recompute: Recompute | None
    """null: everything is kept."""
    fused_cross_entropy: Literal["torch", "cut-cross-entropy"] | None
    """What computes the loss without keeping logits, on whose kernels; null: Megatron's own loss, which keeps them."""
    checkpoint: Checkpoint | None
    """null: nothing is saved, and a run that was stopped cannot go on."""
    health: Health


class Optimizer(Section):
    """Adam, and its schedule."""

    lr: Annotated[float, Field(gt=0.0)]
    min_lr: Rate
    decay: Literal["constant", "cosine"]
    warmup_iterations: NonNegative
    weight_decay: Rate
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)]
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)]
    epsilon: Annotated[float, Field(gt=0.0)]
    clip_grad: Rate
    """Largest global gradient norm; 0 for none."""
    distributed: bool
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool
    """Gather updated weights while the forward pass runs (needs distributed and overlap_grad_reduce)."""


class Data(Section):
    """Where tokens come from."""

    path: Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
    """A directory that `megacpp-stp data prepare` wrote, relative to the working directory."""
    workers: NonNegative
    """DataLoader worker processes a rank."""


class Launch(Section):
    """The world that the recipe is for."""

    nodes: Positive
    processes_per_node: Positive
    environment: dict[VariableName, int | VariableText | None]
    """Environment variables of every rank beside those that the plan derives: a value sets one, null leaves one to the
    machine."""


class Recipe(Section):
    """One complete recipe, resolved: the object that is planned, hashed and stored."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str
    provenance: Literal["sourced", "partly-sourced", "project-defined"]
    """Whether the architecture is published, published in part, or this project's own choice; docs/family.md."""
    model: Model
    stp: Stp | None
    """null: no STP at all, no tap, no measurement."""
    parallel: Parallel
    training: Training
    optimizer: Optimizer
    data: Data
    launch: Launch
    megatron: dict[OptionName, OptionValue]
    """Options of Megatron that no other key stands for, by name without dashes; true for one without a value."""
    overrides: tuple[str, ...] = ()
    """What ``--set`` changed, in order. Recorded by the loader; not a key of the file."""
