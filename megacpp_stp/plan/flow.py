"""One kind of communication: how much of what a collective moves is sent, and how much of that leaves a node.

A ring of n GPUs sends (n-1)/n of a tensor to gather or reduce-scatter it, and twice that to all-reduce it (Thakur,
Rabenseifner, Gropp 2005, "Optimization of collective communication operations in MPICH"); an all-to-all sends (n-1)/n
of its input where routing is uniform, and of what goes round a ring in its own right as much as in a gather.  NCCL may
choose other algorithms, which send no less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megacpp_stp.plan.placement import Axis, Placement

Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ring", "send"]
_HALVES: dict[Operation, int] = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "ring": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One kind of communication.

    Attributes:
        axis: Over which process groups.
        operation: How.
        what: What is moved, in words.
        size: GPUs of a group.
        payload: Bytes a step of the tensors as the busiest GPU handles them: what a gather results in, what the
            others start from.
        sent: Bytes a step that this GPU sends.
        over_network: Bytes a step that the busiest node sends to other nodes for it; 0 inside nodes.
    """

    axis: Axis
    operation: Operation
    what: str
    size: int
    payload: int
    sent: int
    over_network: int


def collective(placement: Placement, axis: Axis, operation: Operation, what: str, payload: int) -> Flow:
    """Of a payload as `Flow` has it."""
    size = placement.size(axis)
    sent = _HALVES[operation] * payload * (size - 1) // size
    return Flow(
        axis=axis,
        operation=operation,
        what=what,
        size=size,
        payload=payload,
        sent=sent,
        over_network=_over_network(placement, axis, operation, payload=payload, sent=sent),
    )


def _over_network(placement: Placement, axis: Axis, operation: Operation, *, payload: int, sent: int) -> int:
    """Of the busiest node. In a ring the last rank of a group on a node sends to another node; in an all-to-all all."""
    nodes = [0] * placement.nodes
    for group in placement.groups(axis):
        homes = [placement.node_of(rank) for rank in group]
        if len(set(homes)) == 1:
            continue
        for node in set(homes):
            here = homes.count(node)
            if operation == "all-to-all":
                nodes[node] += here * payload * (len(group) - here) // len(group)
            else:
                nodes[node] += sent
    return max(nodes)
