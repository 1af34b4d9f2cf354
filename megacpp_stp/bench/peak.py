"""Peak memory of a stretch of code in this process: what it adds to what is held when it starts."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


class CpuPeak:
    """Resident size of this process, whose highest value Linux keeps and lets one reset."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, to be counted again
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._bytes("VmRSS:")

    def added_bytes(self) -> int:
        """The highest value since the start, above that at the start."""
        return self._bytes("VmHWM:") - self._before

    @staticmethod
    def _bytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


class GpuPeak:
    """What torch's allocator hands out."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def added_bytes(self) -> int:
        """As `CpuPeak.added_bytes`; waits for the GPU."""
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before
