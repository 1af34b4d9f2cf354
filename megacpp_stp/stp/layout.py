"""Which positions of a sequence a rank's hidden states hold, and how sampled rows reach every rank.

Letters: s length of the whole sequence, b batch, h hidden, tp and cp sizes of the tensor- and context-parallel
groups, m sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """This rank's share of each sequence; the default is all of it.

    Megatron splits twice. Context parallelism cuts the sequence into ``2 * cp`` chunks and gives rank r chunks r and
    ``2 * cp - 1 - r``, one after the other (core/utils.py, `get_batch_on_this_cp_rank`). Sequence parallelism cuts
    what is there then into tp contiguous shards (core/tensor_parallel/mappings.py).

    Attributes:
        tensor_size: tp under sequence parallelism; 1 without, where each tensor rank holds the same states.
        tensor_rank: Below `tensor_size`.
        context_size: cp.
        context_rank: Below `context_size`.
        group: The ranks that share a sequence; None when this rank holds all of it.
    """

    tensor_size: int = 1
    tensor_rank: int = 0
    context_size: int = 1
    context_rank: int = 0
    group: dist.ProcessGroup | None = None

    def whole(self, held: int) -> int:
        """Length of the sequence of which this rank holds `held` positions."""
        return held * self.tensor_size * self.context_size

    def locate(self, position: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
        """Where positions of the whole sequence are on this rank.

        Args:
            position: int64, any shape, below `length`.
            length: s, a multiple of ``tp`` or, with context parallelism, of ``2 * cp * tp``.

        Returns:
            Local positions, 0 where another rank holds it, and the mask of those held here.
        """
        held = length // (self.tensor_size * self.context_size)
        place = position
        mine = torch.ones_like(position, dtype=torch.bool)
        if self.context_size > 1:
            size = length // (2 * self.context_size)
            chunk, offset = position // size, position % size
            last = 2 * self.context_size - 1
            mine = torch.minimum(chunk, last - chunk) == self.context_rank
            place = torch.where(chunk < self.context_size, offset, offset + size)
        mine = mine & (place // held == self.tensor_rank)
        return torch.where(mine, place % held, 0), mine

    def share(self, rows: Tensor, mine: Tensor) -> Tensor:
        """Rows of the whole sequence on every rank, from those that each rank holds.

        Each row has one owner and the others add zeros, so the sum is exact in any order.

        Args:
            rows: ``[m, h]``, fp32 or fp64; what other ranks hold is ignored, NaN included.
            mine: ``[m]`` bool.

        Returns:
            ``[m, h]``, the same on all ranks of `group`.
        """
        if self.group is None:
            return rows
        rows = torch.where(mine.unsqueeze(-1), rows, 0)
        dist.all_reduce(rows, group=self.group)
        return rows


def reference_positions(layout: SequenceLayout, length: int) -> list[int]:
    """The positions that a rank holds, in its order, by slicing lists: the truth for `SequenceLayout.locate`."""
    positions = list(range(length))
    if layout.context_size > 1:
        size = length // (2 * layout.context_size)
        chunks = [positions[i : i + size] for i in range(0, length, size)]
        positions = chunks[layout.context_rank] + chunks[2 * layout.context_size - 1 - layout.context_rank]
    held = len(positions) // layout.tensor_size
    return positions[layout.tensor_rank * held : (layout.tensor_rank + 1) * held]


def sequence_layout(transformer_config: Any, groups: Any) -> SequenceLayout:
    """This rank's share under a Megatron configuration.

    Args:
        transformer_config: Megatron's TransformerConfig.
        groups: Megatron's ProcessGroupCollection, with ``tp``, ``cp`` and ``tp_cp``.

    Raises:
        UserError: Context parallelism whose split changes from sequence to sequence.
    """
    if transformer_config.hybrid_context_parallel:
        raise UserError(
            "STP does not know which rank holds a position when the context-parallel size changes with the sequence",
            field="--hybrid-context-parallel",
            fix="leave it out",
        )
    context, sequence = groups.cp.size(), transformer_config.sequence_parallel and groups.tp.size() > 1
    if context > 1:
        group = groups.tp_cp if sequence else groups.cp
    else:
        group = groups.tp if sequence else None
    return SequenceLayout(
        tensor_size=groups.tp.size() if sequence else 1,
        tensor_rank=groups.tp.rank() if sequence else 0,
        context_size=context,
        context_rank=groups.cp.rank(),
        group=group,
    )
