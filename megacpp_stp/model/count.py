"""How many parameters the built model has, on which pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def count_parameters(chunks: Sequence[nn.Module], *, device: torch.device) -> list[int]:
    """Parameters of each pipeline rank, without tensor or expert parallelism.

    A tied output layer is a second copy of the embedding on the last stage and counts once.

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
        parameter.numel()
        for parameter in chunk.parameters()
        if is_first or not getattr(parameter, "shared_embedding", False)
    )
