"""Whether a launcher works in a run directory, as far as one can see from here without being in its way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from megacpp_stp.runs.lock import LAUNCHER_LOCK
from megacpp_stp.runs.receipt import read_receipt

NOT_SEEN = "no launcher of it is seen on this machine: it was killed, or runs on another machine"
CANNOT_SEE = "whether its launcher is still there cannot be seen from here"


def launcher_is_there(directory: Path) -> bool | None:
    """Whether a living process holds the launcher's lock; None where that cannot be seen.

    The kernel lets a lock go with its process, so that a killed launcher leaves none. Locks of another machine are
    seen only where the file system shares them. A free lock is held here for as long as it takes to let it go, which
    a launch that begins in that moment waits for.
    """
    try:
        handle = os.open(directory / LAUNCHER_LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def read_going_on(directory: Path) -> tuple[dict[str, Any], bool | None]:
    """A run's receipt, and whether the run is going on: False where it has ended or no launcher is seen, None where
    that cannot be seen.

    The lock comes first: a launcher writes down the end before it lets go.

    Raises:
        UserError: Not a readable run directory.
    """
    there = launcher_is_there(directory)
    receipt = read_receipt(directory)
    return receipt, False if has_ended(receipt) else there


def has_ended(receipt: dict[str, Any]) -> bool:
    """Whether a receipt has its run's last word."""
    return receipt["status"] == "complete" or receipt.get("ended") is not None


def unseen(receipt: dict[str, Any], running: bool | None) -> str | None:
    """What to bear in mind of a run that has not ended and is not seen to go on; None for any other."""
    if has_ended(receipt) or running:
        return None
    return CANNOT_SEE if running is None else NOT_SEEN
