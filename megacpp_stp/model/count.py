"""How many parameters the built model has, on which pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def count_parameters(chunks: Sequence[nn.Module], *, device: torch.device) -> list[int]:
    """Parameters of each pipeline rank, over its tensor- and expert-parallel ranks.

    A weight that tensor-parallel ranks hold whole counts once, and so does a second copy of the embedding on the last
    stage (a tied output layer, multi-token prediction).

    Args:
        chunks: This rank's bare model chunks.
        device: Of the collective; every rank must call this.

    Returns:
        One number a pipeline rank.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    counts[dist.get_rank(group)] = sum(_own(chunk) for chunk in chunks)
    dist.all_reduce(counts, group=group)
    return [int(count) for count in counts.tolist()]


def _own(chunk: nn.Module) -> int:
    is_first = getattr(chunk, "pre_process", True)
    return sum(
        parameter.numel() * _parts(parameter)
        for parameter in chunk.parameters()
        if is_first or not getattr(parameter, "shared_embedding", False)
    )


def _parts(parameter: nn.Parameter) -> int:
    """How many ranks hold a part of it, each a different one (the attributes that Megatron's layers set)."""
    from megatron.core import parallel_state

    is_expert = not getattr(parameter, "allreduce", True)
    experts = parallel_state.get_expert_model_parallel_world_size() if is_expert else 1
    if not getattr(parameter, "tensor_model_parallel", False):
        return experts
    if is_expert:
        return experts * parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_world_size()
