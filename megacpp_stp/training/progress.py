"""Where a rank is: marked by its main thread, at no cost that can be seen; read by the watchdog's.

A mark is one new tuple: the reader sees progress when it finds another object, so that no clock is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Phase = Literal["start-up", "data", "forward", "backward", "optimizer", "evaluation", "save", "closing"]


class Mark(NamedTuple):
    """A place in a run.

    Attributes:
        phase: What the rank does. ``backward`` is all that follows a microbatch's forward until the next one or the
            optimizer: its backward pass, what is sent and received, in the end the reduction of gradients.
        iteration: As in metrics.jsonl, from 1; of evaluation and save the one that came before. None at the start.
        microbatch: How many this rank has begun in the iteration, or in the evaluation; None outside of both.
        slow: Whether this may take long: start-up, the first iteration, a checkpoint, what follows the last one.
    """

    phase: Phase
    iteration: int | None = None
    microbatch: int | None = None
    slow: bool = False


class Progress:
    """The marks of one rank; `mark` is the last one.

    Args:
        iteration: Returns the number of iterations completed; first asked with the first batch.
    """

    def __init__(self, iteration: Callable[[], int]) -> None:
        self.mark = Mark("start-up", slow=True)
        self._iteration = iteration
        self._number: int | None = None
        self._microbatch = 0
        self._training: bool | None = None
        self._first = True

    def data(self, *, training: bool) -> None:
        """A microbatch begins: its data are read next."""
        if training is not self._training:
            self._training, self._microbatch = training, 0
            if training:
                self._number = self._iteration() + 1
            elif self._number is None:
                self._number = self._iteration()
        self._microbatch += 1
        self._go("data" if training else "evaluation")

    def forward(self) -> None:
        """The model runs next."""
        self._go("forward" if self._training else "evaluation")

    def backward(self) -> None:
        """The forward of a microbatch is done, or its backward has reached this stage."""
        self._go("backward" if self._training else "evaluation")

    def optimizer(self) -> None:
        """The optimizer steps next."""
        self._go("optimizer")

    def stepped(self) -> None:
        """The iteration is done."""
        self._training, self._first = None, False
        self._go("optimizer")

    def save(self) -> None:
        """A checkpoint is written next."""
        self._training = None
        self.mark = Mark("save", self._number, None, True)

    def closing(self) -> None:
        """Training is over; what is left is to say how it ended."""
        self._training = None
        self.mark = Mark("closing", self._number, None, True)

    def _go(self, phase: Phase) -> None:
        microbatch = None if phase == "optimizer" else self._microbatch
        self.mark = Mark(phase, self._number, microbatch, self._first)
