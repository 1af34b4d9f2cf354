"""What an output layer returns in the place of its logits: the means to the loss, and not the logits.

Megatron's models hand the output layer's result to ``_scale_logits``, the loss and, for multi-token prediction, to a
count of right guesses. `DeferredLogits` answers just what these ask, without the logits.  Whoever wants the logits
themselves gets them by ``transpose``, as Megatron does without labels; anything else is refused, so that a new use
upstream fails instead of being wrong.

Letters: s sequence, b batch, h hidden, v this rank's part of the vocabulary with its padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from megacpp_stp.flce.backends import Loss
from megacpp_stp.flce.chunked import Best, Options, best_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How one output layer turns hidden states into losses.

    Attributes:
        loss: Computes them; see `megacpp_stp.flce.backends.find_backend`.
        options: With which options.
        logits: Megatron's own way: (hidden, weight) to logits [s, b, v].
    """

    loss: Loss
    options: Options
    logits: Callable[[Tensor, Tensor], Tensor]


class DeferredLogits:
    """Logits [s, b, v] that were not computed.

    Args:
        hidden: What came into the output layer: [s, b, h], or [s/tp, b, h] under sequence parallelism.
        weight: Of the output layer or the embedding, [v, h].
        head: What to do with them.
        scale: Factor of the logits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, head: Head, *, scale: float = 1.0) -> None:
        self._hidden, self._weight, self._head, self._scale = hidden, weight, head, scale
        self._best: Best | None = None

    def loss(self, labels: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            labels: [s, b].

        Returns:
            [s, b], fp32 (fp64 for fp64).
        """
        loss, self._best = self._head.loss(self._hidden, self._weight, labels, self._options)
        return loss

    @property
    def _options(self) -> Options:
        return replace(self._head.options, scale=self._head.options.scale * self._scale)

    @property
    def shape(self) -> torch.Size:
        """That the logits would have."""
        sequence, batch, _ = self._hidden.shape
        options = self._head.options
        if options.sequence_parallel and options.group is not None:
            sequence *= options.group.size()
        return torch.Size((sequence, batch, self._weight.shape[0]))

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def __mul__(self, factor: float) -> DeferredLogits:
        if not isinstance(factor, int | float):
            self._refuse("a product with anything but a number")
        return DeferredLogits(self._hidden, self._weight, self._head, scale=self._scale * factor)

    def max(self, dim: int) -> Best:
        """Each token's largest logit on this rank, and its column. Without a gradient.

        Args:
            dim: -1.
        """
        if dim not in (-1, 2):
            self._refuse("a maximum over another dimension than the vocabulary")
        if self._best is None:
            self._best = best_logits(self._hidden, self._weight, self._options)
        return self._best

    def transpose(self, first: int, second: int) -> Tensor:
        """The logits after all, with two dimensions swapped."""
        logits = self._head.logits(self._hidden, self._weight)
        return (logits if self._scale == 1.0 else logits * self._scale).transpose(first, second)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.argmax and isinstance(args[0], DeferredLogits):
            return args[0].max(**{"dim": None, **(kwargs or {})}).indices
        cls._refuse(f"torch.{getattr(func, '__name__', func)}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"logits that were not computed have no {name}: the loss is fused with the output layer")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise TypeError(f"logits that were not computed do not support {what}: the loss is fused with the output layer")
