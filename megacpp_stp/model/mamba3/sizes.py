"""The sizes of a Mamba-3 layer on one tensor-parallel rank, and what the mixer refuses.

Legend: H heads, P channels of a head, G groups, N state channels, S rotated pairs, R inputs and outputs of a head at
each step (MIMO), T tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpp_stp.model.errors import BuildError

_ROPE_FRACTIONS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba3Sizes:
    """What one rank holds; with T = 1, the layer's own sizes.

    Attributes:
        heads: H / T.
        head_dim: P.
        groups: G / T.
        state: N.
        pairs: S, 0 without rotation.
        rank: R.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    pairs: int
    rank: int

    @classmethod
    def of(cls, config: TransformerConfig, *, rope_fraction: float, mimo_rank: int, tensor_parallel: int) -> Self:
        """The sizes that the configuration asks for, on one of `tensor_parallel` ranks.

        Args:
            config: Megatron's configuration.
            rope_fraction: Share of the state channels that rotate: 0, 0.5 or 1.
            mimo_rank: R.
            tensor_parallel: T.

        Raises:
            BuildError: A size is missing, not positive, or does not divide.
        """
        heads, groups, state = config.mamba_num_heads, config.mamba_num_groups, config.mamba_state_dim
        sizes = {
            "mimo_rank": mimo_rank,
            "--mamba-num-heads": heads,
            "--mamba-head-dim": config.mamba_head_dim,
            "--mamba-num-groups": groups,
            "--mamba-state-dim": state,
        }
        for option, size in sizes.items():
            if size is None or size < 1:
                raise BuildError("Mamba-3 needs this size", field=option, value=size, fix="give a positive number")
        if heads % groups:
            raise BuildError(
                "the groups do not divide the heads evenly",
                field="--mamba-num-groups",
                value=f"{groups} groups, {heads} heads",
                fix="give a divisor of --mamba-num-heads",
            )
        if groups % tensor_parallel:
            raise BuildError(
                "tensor parallelism cuts Mamba-3 by groups, and these do not divide evenly over the ranks",
                field="--mamba-num-groups",
                value=f"{groups} groups, {tensor_parallel} ranks",
                fix="give a multiple of --tensor-model-parallel-size",
            )
        return cls(
            heads=heads // tensor_parallel,
            head_dim=config.mamba_head_dim,
            groups=groups // tensor_parallel,
            state=state,
            pairs=_rotated_pairs(state, rope_fraction),
            rank=mimo_rank,
        )

    @property
    def parts(self) -> dict[str, int]:
        """Rows of in_proj on this rank, part by part, in order.

        z gate, x input, B and C key and query, dt step, A decay, trap weight of the trapezoidal rule. B and C have
        their R vectors group by group, so that a rank has all of its groups.
        """
        inner, keys = self.heads * self.head_dim, self.groups * self.rank * self.state
        return {
            "z": inner,
            "x": inner,
            "B": keys,
            "C": keys,
            "dt": self.heads,
            "A": self.heads,
            "trap": self.heads,
        }


def _rotated_pairs(state: int, fraction: float) -> int:
    if fraction not in _ROPE_FRACTIONS:
        raise BuildError(
            "Mamba-3 rotates none, half or all of the state channels",
            field="rope_fraction",
            value=fraction,
            fix=f"give one of {', '.join(map(str, _ROPE_FRACTIONS))}",
        )
    pairs = int(state * fraction) // 2
    if fraction and not pairs:
        raise BuildError(
            "too few state channels to rotate a pair of them", field="--mamba-state-dim", value=state, fix="give 4"
        )
    return pairs


def refuse_what_is_missing(config: TransformerConfig, *, context_parallel: int, chunk_size: int) -> None:
    """Refuse what the mixer would otherwise ignore.

    Args:
        config: Megatron's configuration.
        context_parallel: Size of the context-parallel group.
        chunk_size: Steps of a chunk.

    Raises:
        BuildError: Context parallelism, a state kept in less than fp32, or no chunk at all.
    """
    if context_parallel > 1:
        raise BuildError(
            "Mamba-3 has no context parallelism",
            field="--context-parallel-size",
            value=context_parallel,
            fix="use 1",
        )
    if config.mamba_training_ssm_states_dtype not in (None, torch.float32):
        raise BuildError(
            "Mamba-3 keeps its state in fp32",
            field="--mamba-training-ssm-states-dtype",
            value=config.mamba_training_ssm_states_dtype,
            fix="leave it out",
        )
    if chunk_size < 1:
        raise BuildError("a chunk has at least one step", field="chunk_size", value=chunk_size, fix="use 64")
