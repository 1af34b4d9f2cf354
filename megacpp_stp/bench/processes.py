"""Wall time of whole processes, taken in turns so that what else the machine does hits all of them alike."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megacpp_stp.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall times of one command.

    Attributes:
        seconds: One a round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.seconds)


def time_in_turns(commands: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, Timing]:
    """Run each command once a round, after one round that is not counted (it fills the caches).

    Args:
        commands: Arguments by name.
        rounds: Counted rounds.

    Raises:
        UserError: A command that fails.
    """
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            seconds = _time(name, command)
            if number:
                found[name].append(seconds)
    return {name: Timing(seconds=tuple(each)) for name, each in found.items()}


def _time(name: str, command: Sequence[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    seconds = time.perf_counter() - start
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"failed: {reason}", field=name, value=" ".join(command), fix="run it by hand")
    return seconds
