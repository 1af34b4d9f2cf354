"""What the STP parity suite covers."""

from __future__ import annotations

from tests.parity.cell import (
    BLOCK,
    EXPERT_LOSSES,
    GROUPED_QUERY,
    IN_DOUBLE,
    NO_EXPERTS,
    NO_LATENT,
    POSITION_WISE,
    SELECTIVE,
    SPLIT_SUMS,
    STEPS,
    UNIFORM,
    Cell,
)
from tests.parity.cells_letters import LETTER_CELLS
from tests.parity.cells_policy import POLICY_CELLS

_LAYOUTS = (
    Cell(name="PP1", quick=True),
    Cell(name="PP2", pipeline=2, quick=True),
    Cell(name="PP4", pipeline=4),
    Cell(name="PP2 x VPP2", pipeline=2, virtual=2, quick=True),
    Cell(name="PP1, 1 microbatch", microbatches=(1,) * STEPS),
    Cell(name="PP2, 1 microbatch", pipeline=2, microbatches=(1,) * STEPS),
    Cell(name="PP2, 1, 2, 4 microbatches", pipeline=2, microbatches=(1, 2, 4)),
    Cell(name="PP2, tap on first stage", pipeline=2, taps=(1,)),
    Cell(name="PP4, tap on a middle stage", pipeline=4, taps=(6,)),
    Cell(name="PP2, taps unevenly on stages", pipeline=2, taps=(1, 2, 3, 9)),
    Cell(name="PP2, no experts", pipeline=2, layers=NO_EXPERTS),
    Cell(name="PP2, experts' losses", pipeline=2, model=EXPERT_LOSSES, microbatches=(4,)),
    Cell(name="PP2, multi-token prediction", pipeline=2, prediction="E-"),
    Cell(name="PP2, multi-token prediction, full recomputation", pipeline=2, prediction="E-", settings=BLOCK),
    Cell(name="PP2, loss scale 1024", pipeline=2, loss_scale=(1024.0,) * STEPS),
    Cell(name="TP2", tensor=2, layers=GROUPED_QUERY, model=NO_LATENT, tolerance=SPLIT_SUMS, quick=True),
    Cell(name="TP2 + SP", tensor=2, sequence_parallel=True, tolerance=SPLIT_SUMS, quick=True),
    Cell(name="TP2, fp64", tensor=2, layers=GROUPED_QUERY, model=NO_LATENT, **IN_DOUBLE),
    Cell(name="TP2 + SP, fp64", tensor=2, sequence_parallel=True, **IN_DOUBLE),
    Cell(
        name="TP2 + SP, experts' losses",
        tensor=2,
        sequence_parallel=True,
        microbatches=(4,),
        model=EXPERT_LOSSES,
        tolerance=SPLIT_SUMS,
    ),
    Cell(name="PP2 x TP2", pipeline=2, tensor=2, layers=GROUPED_QUERY, model=NO_LATENT, tolerance=SPLIT_SUMS),
    Cell(name="PP2 x TP2 + SP", pipeline=2, tensor=2, sequence_parallel=True, tolerance=SPLIT_SUMS),
    Cell(name="CP2", context=2, layers=POSITION_WISE, quick=True),
    Cell(name="CP2, fp64", context=2, layers=POSITION_WISE, **IN_DOUBLE),
    Cell(name="CP2 x PP2", context=2, pipeline=2, layers=POSITION_WISE),
    Cell(
        name="CP2 x TP2 + SP", context=2, tensor=2, sequence_parallel=True, layers=POSITION_WISE, tolerance=SPLIT_SUMS
    ),
    Cell(name="CP2 x TP2 + SP, fp64", context=2, tensor=2, sequence_parallel=True, layers=POSITION_WISE, **IN_DOUBLE),
    Cell(name="EP2", data=2, expert=2, microbatches=(2,) * STEPS, quick=True),
    Cell(name="EP2, two of four experts", data=2, expert=2, microbatches=(2,), model={"moe_router_topk": 2}),
    Cell(name="DP2", data=2, microbatches=(2,) * STEPS, quick=True),
    Cell(name="DP2, masked", data=2, microbatches=(2,) * STEPS, masked=True),
    Cell(name="DP2, distributed optimizer", data=2, microbatches=(2,) * STEPS, distributed_optimizer=True),
    Cell(name="DP2 x PP2", data=2, pipeline=2, microbatches=(2,) * STEPS),
    Cell(name="per token, PP1", per_token=True, masked=True),
    Cell(name="per token, PP2", pipeline=2, per_token=True, masked=True, quick=True),
    Cell(name="per token, PP2 x VPP2", pipeline=2, virtual=2, per_token=True, masked=True),
    Cell(name="per token, DP2", data=2, microbatches=(2,) * STEPS, per_token=True, masked=True, quick=True),
    Cell(name="per token, PP2, 1, 2, 4 microbatches", pipeline=2, microbatches=(1, 2, 4), per_token=True, masked=True),
    Cell(
        name="per token, TP2 + SP", tensor=2, sequence_parallel=True, per_token=True, masked=True, tolerance=SPLIT_SUMS
    ),
    Cell(name="per token, CP2", context=2, layers=POSITION_WISE, per_token=True, masked=True),
    Cell(name="per token, CP2 x PP2", context=2, pipeline=2, layers=POSITION_WISE, per_token=True, masked=True),
    Cell(
        name="per token, DP2, distributed optimizer, loss scale 1024",
        data=2,
        microbatches=(2,) * STEPS,
        per_token=True,
        masked=True,
        distributed_optimizer=True,
        loss_scale=(1024.0,) * STEPS,
    ),
    Cell(name="PP2, full recomputation, uniform", pipeline=2, settings=UNIFORM, quick=True),
    Cell(name="PP2, full recomputation, block", pipeline=2, settings=BLOCK),
    Cell(name="PP2 x VPP2, full recomputation", pipeline=2, virtual=2, settings=UNIFORM),
    Cell(name="TP2 + SP, full recomputation", tensor=2, sequence_parallel=True, settings=UNIFORM, tolerance=SPLIT_SUMS),
    Cell(name="CP2, full recomputation", context=2, layers=POSITION_WISE, settings=UNIFORM),
    Cell(name="per token, PP2, full recomputation", pipeline=2, settings=UNIFORM, per_token=True, masked=True),
    Cell(name="PP2, selective recomputation", pipeline=2, settings=SELECTIVE),
)

CELLS = (*_LAYOUTS, *POLICY_CELLS, *LETTER_CELLS)


def cell(name: str) -> Cell:
    """The cell of that name."""
    (found,) = (candidate for candidate in CELLS if candidate.name == name)
    return found
