"""Where the threads of this process are, in words that name no machine: which collective they wait in, and whence."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

_MOST_FRAMES = 16
# The second sends and receives by batches of requests, which it waits for itself.
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "core/pipeline_parallel/p2p_communication.py")
_MACHINERY = ("torch/", "threading.py", "contextlib.py", "functools.py")
_ENGINE = "torch/autograd/graph.py"  # where the main thread waits while autograd's own threads run a backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a rank is.

    Attributes:
        collective: What it waits in, as ``all_reduce`` or ``recv_forward``; None where it is in none that is known.
        where: The innermost function that is not torch's, with file and line.
        frames: The innermost first, so many as are told.
    """

    collective: str | None
    where: str
    frames: tuple[str, ...]


def position() -> Position:
    """Of the main thread; of the thread that runs its backward pass where that one waits in a collective."""
    main = threading.main_thread().ident
    stacks = {ident: _stack(frame) for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    own = stacks.pop(main, []) if main is not None else []
    collective = collective_of(own)
    if collective is None and own and own[0][0].endswith(_ENGINE):
        for other in stacks.values():
            if (found := collective_of(other)) is not None:
                own, collective = other, found
                break
    return Position(
        collective=collective, where=_where(own), frames=tuple(_told(frame) for frame in own[:_MOST_FRAMES])
    )


Frame = tuple[str, str, int | None]  # file, function, line


def _stack(frame: object) -> list[Frame]:
    """The innermost frame first."""
    return [(_short(found.filename), found.name, found.lineno) for found in reversed(traceback.extract_stack(frame))]  # type: ignore[arg-type]


def collective_of(stack: Sequence[Frame]) -> str | None:
    """The collective that a stack, innermost frame first, waits in; None where it is in none.

    It is named by the function of torch.distributed or of Megatron's pipeline that other code called, or, where that
    waits for a collective of before, by the function that does so.
    """
    found = None
    for name, function, _ in stack:
        if name.endswith(_COLLECTIVES) or found == "wait":
            found = function
        elif not name.startswith(_MACHINERY):
            return found
    return found


def _where(stack: list[Frame]) -> str:
    for frame in stack:
        if not frame[0].startswith(_MACHINERY):
            return _told(frame)
    return _told(stack[0]) if stack else "nowhere"


def _told(frame: Frame) -> str:
    name, function, line = frame
    return f"{function} ({name}:{line})"


def _short(path: str) -> str:
    """From the package on: a report is for strangers."""
    parts = PurePath(path).parts
    for package in ("torch", "megatron", "megacpp_stp"):
        if package in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return parts[-1] if parts else path
