"""Logits a block of the vocabulary at a time, in buffers that each block uses again.

Letters: n tokens, h hidden, v the vocabulary of this rank, w columns of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megacpp_stp.errors import UserError

TILE_BYTES = 32 * 2**20
"""What the buffers of one block may take: they stay in the last cache of a server CPU, and of an H200."""

LEAST_BLOCKS = 16
"""A block is at most this part of the vocabulary, so that few tokens take less memory, too."""

LEAST_COLUMNS = 512
"""A block has as many whatever the other two say: fewer make the matrix products slow."""

_ALIGNMENT = 128


class Tile(NamedTuple):
    """The logits of one block.

    Attributes:
        start: Its first column in the vocabulary of this rank.
        stop: The column after its last.
        raw: [n, w], in the dtype of the weight.
        wide: [n, w], at least fp32; the same memory as ``raw`` where the weight is as wide.
    """

    start: int
    stop: int
    raw: Tensor
    wide: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which softmax and sums are computed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def block_columns(*, tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """How many columns a block has, by `TILE_BYTES`, `LEAST_BLOCKS` and `LEAST_COLUMNS`: a multiple of 128.

    An element takes its dtype's bytes, and those of its fp32 copy where the dtype is narrower.

    Args:
        tokens: Rows of the logits.
        vocabulary: Columns on this rank.
        dtype: Of hidden states and weight.
    """
    wide = wide_dtype(dtype)
    size = wide.itemsize + (dtype.itemsize if dtype != wide else 0)
    fitting = min(TILE_BYTES // (max(tokens, 1) * size), vocabulary // LEAST_BLOCKS) // _ALIGNMENT * _ALIGNMENT
    return min(max(fitting, LEAST_COLUMNS), vocabulary)


class Tiles:
    """All blocks in order; each overwrites the one before.

    Args:
        rows: Hidden states [n, h].
        weight: [v, h].
        scale: Factor of the logits, applied in their own dtype as Megatron does.
        columns: Of a block; None for `block_columns`.

    Raises:
        UserError: Fewer than one column.
    """

    def __init__(self, rows: Tensor, weight: Tensor, *, scale: float, columns: int | None) -> None:
        if columns is None:
            columns = block_columns(tokens=rows.shape[0], vocabulary=weight.shape[0], dtype=weight.dtype)
        if columns < 1:
            raise UserError("a block needs a column", field="columns", value=columns, fix="leave it out")
        self._rows, self._weight, self._scale = rows, weight, scale
        self._columns = min(columns, weight.shape[0])
        size = rows.shape[0] * self._columns
        self._raw = torch.empty(size, dtype=weight.dtype, device=weight.device)
        wide = wide_dtype(weight.dtype)
        self._wide = self._raw if wide == weight.dtype else torch.empty(size, dtype=wide, device=weight.device)

    def __iter__(self) -> Iterator[Tile]:
        count = self._rows.shape[0]
        for start in range(0, self._weight.shape[0], self._columns):
            stop = min(start + self._columns, self._weight.shape[0])
            size = count * (stop - start)
            raw, wide = (buffer[:size].view(count, stop - start) for buffer in (self._raw, self._wide))
            torch.mm(self._rows, self._weight[start:stop].t(), out=raw)
            if self._scale != 1.0:
                raw.mul_(self._scale)
            if wide.dtype != raw.dtype:
                wide.copy_(raw)
            yield Tile(start, stop, raw, wide)
