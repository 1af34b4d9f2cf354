"""How many queries are computed together: as many as fit a scratch of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

MIB = 2**20
CPU_SCRATCH = 32 * MIB
"""Small enough for a chunk's tensors to stay in a CPU's caches, and in what its allocator reuses."""

DEVICE_SCRATCH = 256 * MIB
"""Large enough for a device's kernels to outlast their launches."""


def scratch_of(device: torch.device) -> int:
    """Bytes that one operation may take at a time beside its inputs and results, on ``device``."""
    return CPU_SCRATCH if device.type == "cpu" else DEVICE_SCRATCH


def row_chunks(rows: int, *, bytes_per_row: int, scratch_bytes: int) -> Iterator[slice]:
    """Cut ``rows`` into slices whose temporaries fit a scratch; at least one row each, the last rows first.

    The last queries see the most keys: what a chunk takes fits into what the one before it gave back.

    Args:
        rows: How many there are.
        bytes_per_row: What one row takes at its peak.
        scratch_bytes: What a slice may take.
    """
    size = max(1, scratch_bytes // bytes_per_row)
    for start in reversed(range(0, rows, size)):
        yield slice(start, min(start + size, rows))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and probabilities are computed in: fp32, as upstream, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)
