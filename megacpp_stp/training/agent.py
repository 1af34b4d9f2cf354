"""``python -m megacpp_stp.training.agent``: torchrun with its own options, and without its traceback.

`torch.distributed.run` ends in an exception where a rank has failed or a signal has come, and Python shows torch's
frames for it. They tell nothing of the run: the launcher names the first rank that failed, with its own error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run torchrun to its end.

    Args:
        argv: torchrun's options, and what it starts.

    Returns:
        0, or 1 where a rank failed or a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(argv))
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
