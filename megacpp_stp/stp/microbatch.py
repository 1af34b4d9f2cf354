"""How many tokens count in a microbatch, for losses that are a mean over tokens.

Under ``--calculate-per-token-loss`` a microbatch's share of a step is its share of the tokens whose loss is not
masked. Upstream's middle stages never see the mask, so the forward step says the number, on every stage.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.errors import UserError


class TokenCount:
    """The count of the microbatch that runs now.

    Args:
        wanted: Whether the loss is a mean over tokens; if not, everything here does nothing.
        context_group: The ranks that hold the parts of a sequence, over which counts are summed; None for one rank.
    """

    def __init__(self, *, wanted: bool, context_group: dist.ProcessGroup | None = None) -> None:
        self._wanted = wanted
        self._group = context_group
        self._count: Tensor | None = None
        self._forward: Hashable = None

    def set(self, count: Tensor) -> None:
        """Take the count for the forward that comes next.

        Args:
            count: Scalar or of size 1: what the loss function returns as its number of tokens. Under context
                parallelism that is this rank's part, and all ranks of the group must call.
        """
        if not self._wanted:
            return
        total = count.detach().to(torch.float32, copy=True).reshape(())
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        self._count, self._forward = total, None

    def of(self, forward: Hashable) -> Tensor | None:
        """The count in a forward: a 0-dim fp32 tensor, or None when the loss is no mean over tokens.

        Args:
            forward: Names the forward; a count serves one.

        Raises:
            UserError: Nobody set the count for it.
        """
        if not self._wanted:
            return None
        if self._count is None or self._forward not in (None, forward):
            raise UserError(
                "STP under per-token loss must know how many tokens of the microbatch count, on every stage",
                field="--calculate-per-token-loss",
                fix="call StpTaps.set_tokens in the forward step before the model, or leave the option out",
            )
        self._forward = forward
        return self._count
