"""What a letter of the pattern can be: one section for each kind of block."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacpp_stp.recipe.section import NonNegative, Positive, Rate, Section


class Sparse(Section):
    """DeepSeek sparse attention (DSA) on some of the A blocks, Megatron's ``D``."""

    ranks: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    """Which A blocks: their places among all A blocks, counted from 0."""
    indexer_heads: Positive
    """Heads of the indexer, which chooses the keys."""
    indexer_head_dim: Positive
    """Width of one indexer head."""
    topk: Positive
    """Keys that a query attends to."""
    kernel: Literal["upstream", "chunked"]
    """chunked: ours, which holds no tensor of all heads and keys; upstream: Megatron's plain path, or the kernels that
    `megatron.dsa-kernel-backend` names."""
    loss: Literal["dense", "sparse"]
    """Whether the indexer learns from all keys or from the chosen ones."""
    loss_coeff: Rate
    """Coefficient of the indexer's own loss; 0 trains no indexer."""


class Mla(Section):
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
    sparse: Sparse | None
    """null: every A block attends to all keys."""
    dense_mlp: bool
    """Whether a dense MLP of model.ffn_hidden_size follows in each A block, as a Megatron layer of its own."""


class Attention(Section):
    """A: grouped-query attention, Megatron's ``*``."""

    block: Literal["attention"]
    head_dim: Positive
    """Width of one head."""
    kv_groups: Positive
    """Key/value groups; equal to model.heads for plain multi-head attention."""
    dense_mlp: bool
    """Whether a dense MLP of model.ffn_hidden_size follows in each A block, as a Megatron layer of its own."""


class Router(Section):
    """How an expert layer routes its tokens."""

    score_function: Literal["softmax", "sigmoid"]
    expert_bias: bool
    """Auxiliary-loss-free balancing through a per-expert bias (needs sigmoid)."""
    aux_loss_coeff: Rate
    """Coefficient of the load-balancing loss; 0 leaves it out."""
    z_loss_coeff: Rate
    """Coefficient of the router z-loss; 0 leaves it out."""


class Moe(Section):
    """E: mixture of experts, Megatron's ``E``."""

    block: Literal["moe"]
    experts: Positive
    topk: Positive
    ffn_hidden_size: Positive
    """Hidden width of one routed expert."""
    shared_ffn_hidden_size: NonNegative
    """Hidden width of the shared expert; 0 for none."""
    grouped_gemm: bool
    """One grouped product for all experts of a rank (needs Transformer Engine)."""
    dispatcher: Literal["alltoall", "allgather"]
    """How tokens reach the experts of other ranks."""
    router: Router


class _Ssm(Section):
    heads: Positive
    """Heads of the state-space mixer."""
    head_dim: Positive
    """Channels a head; heads x head_dim is the inner width."""
    state_dim: Positive
    """Size of the state a channel."""
    groups: Positive
    """Groups of heads that share the input and output maps (B and C)."""


class Mamba3(_Ssm):
    """M: Mamba-3 in Megatron's Mamba slot ``M``: a named seam, since megatron-core 0.19 has Mamba-2 only."""

    block: Literal["mamba3"]
    chunk_size: Positive
    """Steps that are computed together."""
    complex_rotation: bool
    """Rotate half of the state by data-dependent angles (the complex form)."""
    mimo_rank: Positive
    """Inputs and outputs of a head at each step (MIMO); 1 for one of each (SISO)."""
    kernel: Literal["torch", "mamba-ssm"]
    """torch: ours, exact in every precision, on any device; mamba-ssm: the authors' kernels, for GPUs and bf16."""


class Mamba2(_Ssm):
    """M: Megatron's own Mamba-2, its ``M``; needs a GPU and mamba-ssm."""

    block: Literal["mamba2"]


class M2rnn(Section):
    """R: matrix-valued recurrence (M2RNN) in Megatron's Mamba slot ``M``: a named seam, by layer number."""

    block: Literal["m2rnn"]
    heads: Positive
    """Heads, each with a state of key_dim x value_dim."""
    key_dim: Positive
    """Rows of a head's state."""
    value_dim: Positive
    """Columns of a head's state."""
    conv_kernel: Positive
    """Steps that the causal convolution of query, key and value sees."""
    checkpoint_every: Positive
    """Steps between two states that are kept for the backward pass."""
    kernel: Literal["torch", "triton", "xma"]
    """torch: ours, on any device; triton: our kernels, for GPUs; xma: the authors', for GPUs, installed from source."""


class StandIn(Section):
    """A dense MLP in the place of a recurrent block: for comparisons, and for layouts that recurrences do not have.

    Never implied: a recipe asks for it by name, and the plan, argv and receipt repeat it. No shipped recipe does.
    """

    block: Literal["stand-in"]
    runs: Literal["mlp"]
    """What runs instead: a dense MLP of model.ffn_hidden_size, Megatron's ``-``."""
    instead_of: Literal["mamba3", "m2rnn"]
    """The block that the family stands for."""


class Families(Section):
    """What each letter of the pattern is. A letter that the pattern has must be here; one that it lacks must not."""

    A: Annotated[Mla | Attention, Field(discriminator="block")] | None = None
    M: Annotated[Mamba3 | Mamba2 | StandIn, Field(discriminator="block")] | None = None
    E: Moe | None = None
    R: Annotated[M2rnn | StandIn, Field(discriminator="block")] | None = None
