"""No process of a run outlives the one that started it, however that one ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

LAUNCHER = "MEGACPP_STP_LAUNCHER"
"""The variable by which torchrun's ranks know the launcher's process id: that of their grandparent."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """From here on, get the signal that ends this process when its parent is gone. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_orphan() -> bool:
    """Whether torchrun has ended, or is to end without its launcher. Ask after `die_with_parent`.

    torchrun may be killed, or interrupted between two ranks that it starts, while a rank imports its first modules: the
    signal of `die_with_parent` comes to nobody then. A rank that nobody of ours started, or not on Linux, is none.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return False
    try:
        stat = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[1] != launcher
