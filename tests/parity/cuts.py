"""How tensor parallelism cuts a weight into parts, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """Which part of a weight this rank holds.

    Attributes:
        dim: What is cut.
        rank: Of this part.
        size: Number of parts.
        parts: Local sizes along `dim` of what is cut each for itself; one for most weights.
    """

    dim: int
    rank: int
    size: int
    parts: tuple[int, ...]


def cut_of(name: str, parameter: Any) -> Cut | None:
    """This rank's part of a weight; None for all of it."""
    from megatron.core import parallel_state as state

    expert = "local_experts" in name
    size = state.get_expert_tensor_parallel_world_size() if expert else state.get_tensor_model_parallel_world_size()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    assert parameter.partition_stride == 1, name
    rank = state.get_expert_tensor_parallel_rank() if expert else state.get_tensor_model_parallel_rank()
    dim = parameter.partition_dim
    return Cut(dim, rank, size, tuple(getattr(parameter, "partition_sizes", None) or [parameter.shape[dim]]))


def part_of(whole: Tensor, cut: Cut | None) -> Tensor:
    """One rank's part of a whole weight."""
    if cut is None:
        return whole
    wholes = whole.split([part * cut.size for part in cut.parts], dim=cut.dim)
    return torch.cat([part.chunk(cut.size, dim=cut.dim)[cut.rank] for part in wholes], dim=cut.dim)


def whole_of(ranks: Sequence[Tensor], cut: Cut) -> Tensor:
    """A whole weight from the parts of all ranks, in their order; `cut` is that of any of them."""
    split = [rank.split(cut.parts, dim=cut.dim) for rank in ranks]
    return torch.cat([part for parts in zip(*split, strict=True) for part in parts], dim=cut.dim)
