"""The options of ``launch`` for several nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megacpp_stp.errors import UserError
from megacpp_stp.recipe import Recipe

if TYPE_CHECKING:
    from megacpp_stp.training.torchrun import Node

_PANEL = "Several nodes"

NnodesOption = Annotated[
    int | None, typer.Option(min=1, help="Nodes; as --set launch.nodes=N.", rich_help_panel=_PANEL)
]
NodeRankOption = Annotated[int | None, typer.Option(min=0, help="Which node this is, from 0.", rich_help_panel=_PANEL)]
EndpointOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Node 0 and a free port there.", rich_help_panel=_PANEL)
]
RdzvIdOption = Annotated[
    str | None, typer.Option(help="A name that no other run has; default: from the run.", rich_help_panel=_PANEL)
]
NodeTimeoutOption = Annotated[
    int, typer.Option(min=1, help="Seconds to wait for the other nodes.", rich_help_panel=_PANEL)
]


def with_nodes(load: Callable[[Sequence[str]], Recipe], overrides: Sequence[str], nnodes: int | None) -> Recipe:
    """A recipe for that many nodes: as it is where it has them, else with one override more.

    Args:
        load: From overrides to the recipe.
        overrides: Of ``--set``.
        nnodes: Of ``--nnodes``; None for what the recipe says.

    Raises:
        UserError: Another number was given by ``--set``.
    """
    recipe = load(overrides)
    if nnodes in (None, recipe.launch.nodes):
        return recipe
    for override in overrides:
        if override.partition("=")[0] in ("launch", "launch.nodes"):
            raise UserError(
                f"contradicts --set {override}", field="--nnodes", value=nnodes, fix="leave one of the two out"
            )
    return load((*overrides, f"launch.nodes={nnodes}"))


def this_node(
    recipe: Recipe, given: dict[str, object], *, port: int | None, run_dir: Path | None, timeout: int
) -> Node | None:
    """This node among several; None where the recipe has one.

    Args:
        recipe: What is launched.
        given: Values of the options by name: node rank, endpoint, rendezvous id, in that order.
        port: Of ``--port``, which is for one node.
        run_dir: Of ``--run-dir``.
        timeout: Of ``--node-timeout``, in seconds.

    Raises:
        UserError: Options that are missing, or not for that many nodes.
    """
    nodes = recipe.launch.nodes
    if nodes == 1:
        for option, value in given.items():
            if value is not None and (option, value) != ("--node-rank", 0):
                fix = "leave it out, or add --nnodes with how many there are"
                raise UserError("is for several nodes, and the plan has one", field=option, value=value, fix=fix)
        return None
    if port is not None:
        raise UserError("is for one node", field="--port", value=port, fix="name the port in --rdzv-endpoint")
    for option in ("--node-rank", "--rdzv-endpoint"):
        if given[option] is None:
            fix = "start this command on each node: --node-rank 0, 1, ... and --rdzv-endpoint HOST-OF-NODE-0:PORT"
            raise UserError(f"is needed: the plan has {nodes} nodes", field=option, fix=fix)
    if run_dir is None:
        fix = "name one directory for all nodes, on a file system that they share"
        raise UserError(f"is needed: the plan has {nodes} nodes", field="--run-dir", fix=fix)
    rank, endpoint, rdzv_id = given.values()
    assert isinstance(rank, int) and isinstance(endpoint, str)
    if rank >= nodes:
        raise UserError(f"is not below the plan's {nodes} nodes", field="--node-rank", value=rank, fix="count from 0")
    from megacpp_stp.training.launcher import port_of
    from megacpp_stp.training.torchrun import Node

    port_of(endpoint)
    return Node(
        rank=rank,
        endpoint=endpoint,
        rdzv_id=None if rdzv_id is None else str(rdzv_id),
        timeout=float(timeout),
    )
