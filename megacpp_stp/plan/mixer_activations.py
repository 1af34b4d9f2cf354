"""What the recurrent mixers keep of a token for their backward pass. Estimates; bytes a token.

Our recurrences keep no state of every step: they compute spans anew. None of the recipe's recomputation of single
modules reaches a Mamba slot. Legend as in `megacpp_stp.plan.mixers`; e bytes of an activation.
"""

from __future__ import annotations

from megacpp_stp.plan.kept import FP32, Bytes, Setting
from megacpp_stp.plan.mixers import (
    m2rnn_convolved,
    m2rnn_of,
    m2rnn_projected,
    mamba2_of,
    mamba2_projected,
    mamba3_angles,
    mamba3_of,
    mamba3_projected,
)

MAMBA3_CHUNKS_IN_SPAN = 8
"""As in `megacpp_stp.model.mamba3`: how many chunks lie between two states that are kept."""

_BF16 = 2
_STILL_PAIRS = 2
"""Angles that the adapter to mamba-ssm passes where none turns."""


def mamba2(setting: Setting) -> Bytes:
    """Megatron's Mamba-2 with mamba-ssm's memory-efficient kernel, which keeps its input and its result.

    Input projection; the scan's result before the gate, and behind it, where the norm begins; the norm's output.
    """
    block, e = mamba2_of(setting.model), setting.element
    inner = block.heads * block.head_dim
    return Bytes(
        sequence=setting.norm(setting.model.hidden_size),
        tensor=e * (mamba2_projected(block) + 3 * inner) + FP32 * block.groups,
    )


def mamba3(setting: Setting) -> Bytes:
    """Input projection; B and C before, in and behind their norms; seven fp32 numbers a head; the gated result.

    And the state [H, P, N] at the start of each span, or what mamba-ssm's kernels keep.
    """
    block, e = mamba3_of(setting.model), setting.element
    inner, keys = block.heads * block.head_dim, block.groups * block.mimo_rank * block.state_dim
    norms = 2 * (2 * FP32 + e) * keys + 2 * FP32 * block.groups * block.mimo_rank
    kept = e * (mamba3_projected(block) + inner) + norms + 7 * FP32 * block.heads
    if block.kernel == "mamba-ssm":
        kept += _mamba_ssm(setting)
    else:
        kept += -(-FP32 * inner * block.state_dim // (MAMBA3_CHUNKS_IN_SPAN * block.chunk_size))
    return Bytes(
        sequence=setting.norm(setting.model.hidden_size),
        tensor=kept,
        whole=e * mamba3_angles(block),
    )


def _mamba_ssm(setting: Setting) -> int:
    """What the kernels keep beyond the projection's parts, of which theirs are copies that take their place.

    From ``_Mamba3Function.forward`` of mamba_ssm/ops/triton/mamba3/mamba3_siso_combined.py (2.3.2), not measured: key
    and query of each head, turned; the result before and behind the gate; a state a chunk; angles and their sums; all
    in bf16. And four fp32 numbers a head, the trapezoid's weight, and two that our adapter makes it from.
    """
    block = mamba3_of(setting.model)
    inner, rows = block.heads * block.head_dim, block.heads * block.state_dim
    states = -(-_BF16 * inner * block.state_dim // block.chunk_size)
    angles = 2 * _BF16 * block.heads * (mamba3_angles(block) or _STILL_PAIRS)
    return _BF16 * 2 * (rows + inner) + states + angles + (6 * FP32 + _BF16) * block.heads


def m2rnn(setting: Setting) -> Bytes:
    """Input projection; the convolution's padded input and its result; the scan's result and the norm's output.

    Four fp32 numbers a head, the norm's root, and the states [H, K, V] that are kept. With tensor parallelism the
    gathered query and key too. XMA keeps query, key and value in fp32 besides.
    """
    block, e = m2rnn_of(setting.model), setting.element
    values = block.heads * block.value_dim
    states = -(-FP32 * values * block.key_dim // block.checkpoint_every)
    gathered = 2 * block.key_dim * e if setting.recipe.parallel.tensor > 1 else 0
    copies = FP32 if block.kernel == "xma" and e != FP32 else 0
    return Bytes(
        sequence=setting.norm(setting.model.hidden_size),
        tensor=e * (m2rnn_projected(block) + 2 * m2rnn_convolved(block) + 2 * values)
        + 4 * FP32 * block.heads
        + states
        + copies * values,
        whole=FP32 + gathered + copies * 2 * block.key_dim,
    )
