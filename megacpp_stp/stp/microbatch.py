"""What STP must be told of a microbatch on every stage: how many of its tokens count, and where its documents are.

Upstream's middle stages see neither tokens nor loss mask, so the forward step says both before it runs the model.

Letters: b batch, s length of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.errors import UserError


class Facts(NamedTuple):
    """What is known of one microbatch.

    Attributes:
        tokens: How many of its tokens count, 0-dim fp32; None unless the loss is a mean over tokens.
        documents: ``[b, s]`` integers, see `megacpp_stp.stp.documents`; None when spans may cross documents.
    """

    tokens: Tensor | None = None
    documents: Tensor | None = None


class Announcement:
    """The facts of the microbatch that runs now. What is not wanted is not looked at.

    Args:
        tokens: Whether the loss is a mean over tokens (``--calculate-per-token-loss``): a microbatch's share of a
            step is then its share of the tokens whose loss is not masked.
        documents: Whether spans stay inside documents.
        context_group: The ranks that hold the parts of a sequence, over which counts are summed; None for one rank.
    """

    def __init__(
        self, *, tokens: bool = False, documents: bool = False, context_group: dist.ProcessGroup | None = None
    ) -> None:
        self._wants_tokens = tokens
        self._wants_documents = documents
        self._group = context_group
        self._facts = Facts()
        self._forward: Hashable = None

    def set(self, *, tokens: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Take the facts for the forward that comes next.

        Args:
            tokens: Scalar or of size 1: what the loss function returns as its number of tokens. Under context
                parallelism that is this rank's part, and all ranks of the group must call.
            documents: ``[b, s]`` integers of the whole sequence, the same on all ranks that share it.
        """
        self._facts = Facts(
            tokens=self._summed(tokens) if self._wants_tokens and tokens is not None else None,
            documents=documents if self._wants_documents else None,
        )
        self._forward = None

    def of(self, forward: Hashable) -> Facts:
        """The facts of a forward.

        Args:
            forward: Names it; what was set serves one forward.

        Raises:
            UserError: Something is wanted and nobody has set it for this forward.
        """
        if not (self._wants_tokens or self._wants_documents):
            return self._facts
        fresh = self._forward in (None, forward)
        if self._wants_tokens and (self._facts.tokens is None or not fresh):
            raise UserError(
                "STP under per-token loss must know how many tokens of the microbatch count, on every stage",
                field="--calculate-per-token-loss",
                fix="call StpTaps.set_microbatch in the forward step before the model, or leave the option out",
            )
        if self._wants_documents and (self._facts.documents is None or not fresh):
            raise UserError(
                "STP inside documents must know where the documents of the microbatch are, on every stage",
                field="stp.within_documents",
                value=True,
                fix="call StpTaps.set_microbatch in the forward step before the model, or write false",
            )
        self._forward = forward
        return self._facts

    def _summed(self, tokens: Tensor) -> Tensor:
        total = tokens.detach().to(torch.float32, copy=True).reshape(())
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total
