"""The recurrent mixers of a Mamba slot: their parameters, and the FLOPs of their recurrences.

* Mamba-2: megatron/core/ssm/mamba_mixer.py, 0.19.2, with that class's defaults (convolution of 4 steps, gated norm).
* Mamba-3: `megacpp_stp.model.mamba3`, after mamba_ssm/modules/mamba3.py of state-spaces/mamba.
* M2RNN: `megacpp_stp.model.m2rnn`.

Legend: h hidden, H heads, P channels of a head, N state, G groups, S angles, R inputs and outputs of a head (MIMO), c
chunk or convolution steps; for M2RNN K key and V value channels of a head. Names are from the layer down; each layer
has a norm of width h before its mixer.
"""

from __future__ import annotations

from collections.abc import Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import Kind
from megacpp_stp.plan.weight import Weight, matrix, vector
from megacpp_stp.recipe.blocks import M2rnn, Mamba2, Mamba3
from megacpp_stp.recipe.schema import Model

MAMBA2_CONV = 4
"""``d_conv`` of MambaMixer, which nothing sets."""

_MAMBA2_SCAN = 7
"""Upstream's own figure, FLOPs an inner channel and state element (``mamba_layer_flops`` of training.py)."""


def mamba2_weights(model: Model) -> Iterator[Weight]:
    """Megatron's Mamba-2 layer. Float16Module casts all of it, A_log and D too."""
    block = mamba2_of(model)
    h, inner, state = model.hidden_size, block.heads * block.head_dim, block.groups * block.state_dim
    yield vector("norm", h)
    yield matrix("mixer.in_proj", h * mamba2_projected(block), split="tensor")
    yield vector("mixer.conv1d_weight", (inner + 2 * state) * MAMBA2_CONV, split="tensor")
    yield vector("mixer.conv1d_bias", inner + 2 * state, split="tensor")
    for name in ("dt_bias", "A_log", "D"):
        yield vector(f"mixer.{name}", block.heads, split="tensor")
    yield vector("mixer.norm", inner, split="tensor")
    yield matrix("mixer.out_proj", inner * h, split="tensor")


def mamba3_weights(model: Model) -> Iterator[Weight]:
    """A Mamba-3 layer; the angle projection only with rotation, ``mimo_x`` and its like only with R > 1."""
    block = mamba3_of(model)
    h, heads, inner = model.hidden_size, block.heads, block.heads * block.head_dim
    yield vector("norm", h)
    yield matrix("mixer.in_proj", h * mamba3_projected(block), split="tensor")
    for name in ("B_norm", "C_norm"):
        yield vector(f"mixer.{name}", block.state_dim)
    for name in ("B_bias", "C_bias"):
        yield vector(f"mixer.{name}", heads * block.mimo_rank * block.state_dim, split="tensor", keeps_fp32=True)
    for name in ("dt_bias", "D"):
        yield vector(f"mixer.{name}", heads, split="tensor", keeps_fp32=True)
    for name in ("mimo_x", "mimo_z", "mimo_o") if block.mimo_rank > 1 else ():
        yield vector(f"mixer.{name}", inner * block.mimo_rank, split="tensor", keeps_fp32=True)
    if angles := mamba3_angles(block):
        yield matrix("mixer.angle_proj", angles * h, split="none")
    yield matrix("mixer.out_proj", inner * h, split="tensor")


def m2rnn_weights(model: Model) -> Iterator[Weight]:
    """An M2RNN layer; query and key have one head, which all heads share."""
    block = m2rnn_of(model)
    h, values, convolved = model.hidden_size, block.heads * block.value_dim, m2rnn_convolved(block)
    yield vector("norm", h)
    yield matrix("mixer.in_proj", h * m2rnn_projected(block), split="tensor")
    yield vector("mixer.conv_weight", convolved * block.conv_kernel, split="tensor")
    yield vector("mixer.conv_bias", convolved, split="tensor")
    yield vector("mixer.state_weight", values * block.value_dim, split="tensor")
    for name in ("A_log", "dt_bias"):
        yield vector(f"mixer.{name}", block.heads, split="tensor", keeps_fp32=True)
    for name in ("D", "norm_weight"):
        yield vector(f"mixer.{name}", values, split="tensor")
    yield matrix("mixer.out_proj", values * h, split="tensor")


def recurrence_flops(model: Model, kind: Kind) -> int:
    """Forward FLOPs a token of everything between a mixer's two projections; none grows with the sequence.

    Mamba-2 as upstream counts it. Mamba-3 by chunks, with the masked half of each: scores and their product with x
    2 c (N + P) R^2, the chunk's state and the reading of the last one 4 N P R a head. M2RNN: state times transition,
    key times value and query times state 2 K V (V + 2) a head, and its convolution.
    """
    if kind == "mamba2":
        block = mamba2_of(model)
        return _MAMBA2_SCAN * block.heads * block.head_dim * block.state_dim
    if kind == "mamba3":
        ssm = mamba3_of(model)
        state, width, rank = ssm.state_dim, ssm.head_dim, ssm.mimo_rank
        return ssm.heads * rank * (2 * ssm.chunk_size * rank * (state + width) + 4 * state * width)
    if kind == "m2rnn":
        rnn = m2rnn_of(model)
        recurrence = 2 * rnn.heads * rnn.key_dim * rnn.value_dim * (rnn.value_dim + 2)
        return recurrence + 2 * rnn.conv_kernel * m2rnn_convolved(rnn)
    return 0


def mamba2_projected(block: Mamba2) -> int:
    """Rows of the input projection: z, x, B, C, dt."""
    return 2 * block.heads * block.head_dim + 2 * block.groups * block.state_dim + block.heads


def mamba3_projected(block: Mamba3) -> int:
    """Rows of the input projection: z, x, B, C, and dt, A, trapezoid a head."""
    keys = block.groups * block.mimo_rank * block.state_dim
    return 2 * block.heads * block.head_dim + 2 * keys + 3 * block.heads


def mamba3_angles(block: Mamba3) -> int:
    """Angles: half of the rotated channels, which are half of the state, rounded down to an even number."""
    return block.state_dim // 2 // 2 if block.complex_rotation else 0


def m2rnn_convolved(block: M2rnn) -> int:
    """Channels of the convolution: q, k, v."""
    return 2 * block.key_dim + block.heads * block.value_dim


def m2rnn_projected(block: M2rnn) -> int:
    """Rows of the input projection: q, k, v, forget gate, output gate."""
    return m2rnn_convolved(block) + block.heads + block.heads * block.value_dim


def mamba2_of(model: Model) -> Mamba2:
    """Family M as a Mamba-2 block."""
    if not isinstance(model.families.M, Mamba2):
        raise undescribed("mamba2")
    return model.families.M


def mamba3_of(model: Model) -> Mamba3:
    """Family M as a Mamba-3 block."""
    if not isinstance(model.families.M, Mamba3):
        raise undescribed("mamba3")
    return model.families.M


def m2rnn_of(model: Model) -> M2rnn:
    """Family R as an M2RNN block."""
    if not isinstance(model.families.R, M2rnn):
        raise undescribed("m2rnn")
    return model.families.R


def undescribed(kind: str) -> UserError:
    """A layer that no family of the recipe describes."""
    return UserError(
        f"the layout has a layer of kind {kind!r}, but no family is a block of that kind",
        field="model.families",
        fix=f"describe a family with block: {kind}",
    )
