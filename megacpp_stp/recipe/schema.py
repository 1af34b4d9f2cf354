"""The typed form of a recipe file. Every key is listed here; an unknown one is an error."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**53)]  # what JSON carries exactly
NonNegative = Annotated[int, Field(ge=0, lt=2**53)]
Rate = Annotated[float, Field(ge=0.0)]
Iterations = Annotated[int, Field(gt=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Mla(_Section):
    """A: multi-head latent attention, Megatron's ``+``."""

    block: Literal["mla"]
    q_lora_rank: Positive
    """Rank of the query's down-projection."""
    kv_lora_rank: Positive
    """Rank of the joint key/value down-projection."""
    qk_head_dim: Positive
    """Query and key width a head, without the rotary part."""
    qk_pos_emb_head_dim: Positive
    """Rotary width a head."""
    v_head_dim: Positive
    """Value width a head."""


class Attention(_Section):
    """A: grouped-query attention, Megatron's ``*``."""

    block: Literal["attention"]
    head_dim: Positive
    """Width of one head."""
    kv_groups: Positive
    """Key/value groups; equal to model.heads for plain multi-head attention."""


class Router(_Section):
    """How an expert layer routes its tokens."""

    score_function: Literal["softmax", "sigmoid"]
    expert_bias: bool
    """Auxiliary-loss-free balancing through a per-expert bias (needs sigmoid)."""
    aux_loss_coeff: Rate
    """Coefficient of the load-balancing loss; 0 leaves it out."""
    z_loss_coeff: Rate
    """Coefficient of the router z-loss; 0 leaves it out."""


class Moe(_Section):
    """E: mixture of experts, Megatron's ``E``."""

    block: Literal["moe"]
    experts: Positive
    topk: Positive
    ffn_hidden_size: Positive
    """Hidden width of one routed expert."""
    shared_ffn_hidden_size: NonNegative
    """Hidden width of the shared expert; 0 for none."""
    router: Router


class StandIn(_Section):
    """A family whose real mixer does not exist on this path yet, and what runs in its place.

    Never implied: a recipe asks for it by name, and the plan, argv and receipt repeat it.
    """

    block: Literal["stand-in"]
    runs: Literal["mlp"]
    """What runs instead: a dense MLP of model.ffn_hidden_size, Megatron's ``-``."""
    instead_of: Literal["mamba3", "m2rnn"]
    """The block that the family stands for."""


class Families(_Section):
    """What each letter of the pattern is. A letter that the pattern has must be here; one that it lacks must not."""

    A: Annotated[Mla | Attention, Field(discriminator="block")] | None = None
    M: StandIn | None = None
    E: Moe | None = None
    R: StandIn | None = None


class Rope(_Section):
    """Rotary position embedding."""

    base: Positive


class Model(_Section):
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
    backend: Literal["torch"]
    """Whose modules: "torch" needs no Transformer Engine and runs on CPU and GPU."""


class Stp(_Section):
    """Semantic Tube Prediction, the trajectory-straightness loss."""

    weight: Rate
    """Factor of the mean STP loss over all taps. 0 measures without training on it."""
    n_spans: Positive
    """Triples a sequence and tap."""
    start_step: Annotated[int, Field(ge=0, lt=2**32)]
    """First iteration (counted from 0) whose gradient has the STP term; before it STP is only measured."""
    taps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Global Megatron layer numbers (1-based) after which hidden states are read."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Key of the triple sampler; Megatron's random streams are not touched."""


class Parallel(_Section):
    """Sizes of the parallel groups. The data-parallel size follows from the world size."""

    tensor: Positive
    pipeline: Positive
    virtual: Positive
    """Virtual stages a pipeline rank; 1 for none."""
    context: Positive
    expert: Positive
    sequence_parallel: bool
    stages: tuple[Positive, ...]
    """Blocks on each stage, in order: pipeline x virtual numbers that add up to model.depth."""


class Training(_Section):
    """The loop."""

    iterations: Iterations
    sequence_length: Annotated[int, Field(ge=3)]
    micro_batch_size: Positive
    global_batch_size: Positive
    seed: Annotated[int, Field(gt=0, lt=2**31)]
    precision: Literal["fp32", "bf16"]
    log_interval: Positive
    eval_interval: Positive
    eval_iterations: NonNegative
    """Batches an evaluation; 0 for none."""


class Optimizer(_Section):
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


class Data(_Section):
    """Where tokens come from."""

    path: Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
    """A directory that `megacpp-stp data prepare` wrote, relative to the working directory."""
    workers: NonNegative
    """DataLoader worker processes a rank."""


class Launch(_Section):
    """The world that the recipe is for."""

    nodes: Positive
    processes_per_node: Positive


class Recipe(_Section):
    """One complete recipe, resolved: the object that is planned, hashed and stored."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str
    provenance: Literal["sourced", "project-defined"]
    """Whether the architecture is published, or this project's own choice."""
    model: Model
    stp: Stp | None
    """null: no STP at all, no tap, no measurement."""
    parallel: Parallel
    training: Training
    optimizer: Optimizer
    data: Data
    launch: Launch
    overrides: tuple[str, ...] = ()
    """What ``--set`` changed, in order. Recorded by the loader; not a key of the file."""
