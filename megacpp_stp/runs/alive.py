"""Whether a launcher works in a run directory, as far as one can see without being in its way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_LAUNCHER = ".launcher.lock"  # of `megacpp_stp.runs.lock`


def launcher_is_there(directory: Path) -> bool | None:
    """Whether somebody holds the launcher's lock; None where that cannot be seen.

    A free lock is held for as long as it takes to let it go. A launch that begins in that moment is refused, so ask
    only of a run that gives no sign of life.
    """
    try:
        handle = os.open(directory / _LAUNCHER, os.O_RDONLY | os.O_NONBLOCK)
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
