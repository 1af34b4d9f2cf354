"""One parameter of a model, as the planner counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["none", "tensor", "expert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter, or a module's parameters of one kind.

    Attributes:
        name: As in Megatron's module tree, from the layer down.
        count: Elements in the whole model, over all tensor- and expert-parallel ranks.
        active: Elements that one token meets: the experts that it is not routed to are left out.
        split: Over which group it is cut: ``none`` is whole on every rank, ``expert`` is cut over expert-parallel
            ranks and, inside each, over tensor-parallel ones (Megatron's default expert-tensor size).
        is_matrix: Whether a token is multiplied by it: one multiply-add an active element. False for norms and for
            the embedding, which is looked up.
        keeps_fp32: Whether it stays fp32 in a bf16 model.
    """

    name: str
    count: int
    active: int
    split: Split
    is_matrix: bool
    keeps_fp32: bool

    def on_gpu(self, *, tensor: int, expert: int) -> int:
        """Elements on one GPU. `tensor` and `expert` are the sizes of those groups."""
        return self.count // {"none": 1, "tensor": tensor, "expert": tensor * expert}[self.split]


def matrix(name: str, count: int, *, split: Split, active: int | None = None) -> Weight:
    """A matrix that a token is multiplied by; all of it when `active` is None."""
    return Weight(
        name=name,
        count=count,
        active=count if active is None else active,
        split=split,
        is_matrix=True,
        keeps_fp32=False,
    )


def vector(name: str, count: int, *, split: Split = "none", keeps_fp32: bool = False) -> Weight:
    """A parameter that enters no matrix product: norms, biases, lookups, convolutions, recurrences."""
    return Weight(name=name, count=count, active=count, split=split, is_matrix=False, keeps_fp32=keeps_fp32)
