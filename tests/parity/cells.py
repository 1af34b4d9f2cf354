"""What the STP parity suite covers: one cell, one way to run a small model, with the same gradient in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megacpp_stp.stp.config import StpConfig
from tests.parity._gloo import Layout

ITERATION = 3  # the first one of a cell, with the gate just open
STEPS = 3

# Megatron's symbols of ten layers on four segments, so that virtual stages have experts everywhere.
ALL_KINDS = ("+E", "-E+", "E-", "+E-")  # attention, experts, MLP
NO_EXPERTS = ("+-", "--+", "+-", "+--")
# Upstream's MLA has a wrong gradient of its own under tensor parallelism without sequence parallelism, and its experts
# refuse that: grouped-query attention and MLPs there.
GROUPED_QUERY = ("*-", "--*", "*-", "*--")
# Attention under context parallelism has no CPU implementation upstream: layers that see one position at a time.
POSITION_WISE = ("-E", "-E-", "E-", "-E-")

# Heavy, so that a wrong factor cannot hide beside the language-model loss.
WEIGHT = 2.0
TAPS = (2, 5, 7, 10)  # the ends of the four segments
STP_SEED = 11

# Losses of the experts with an autograd function and a scale of their own, heavy for the same reason.
EXPERT_LOSSES = {
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 2.0,
    "moe_z_loss_coeff": 0.1,
}
NO_LATENT = {"multi_latent_attention": False, "num_query_groups": 2}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "moe"]}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to run, and what must come out.

    Attributes:
        name: Of the row in the table.
        layers: Megatron's symbols on each of four segments.
        tensor: Tensor-parallel size; likewise the following.
        microbatches: Of one data rank, in each of the steps.
        masked: Some tokens do not count, more on one rank than on another.
        prediction: Layers of one depth of multi-token prediction. They count from 1 again: one has a tap's number.
        settings: Of the transformer configuration, on the schedule's side only.
        model: Of the transformer configuration, on both sides.
        double: In fp64, all but the cross entropy, which is fp32 upstream; Megatron's optimizer has none, so that it
            is gradients only.
        tolerance: Largest relative error of a gradient.
        quick: Whether it belongs to the tests that run at every change.
    """

    name: str
    layers: tuple[str, ...] = ALL_KINDS
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    data: int = 1
    expert: int = 1
    distributed_optimizer: bool = False
    microbatches: tuple[int, ...] = (4,) * STEPS
    per_token: bool = False
    masked: bool = False
    loss_scale: float = 1.0
    taps: tuple[int, ...] = TAPS
    prediction: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    double: bool = False
    tolerance: float = 1e-6
    quick: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual=self.virtual,
            context=self.context,
            expert=self.expert,
        )

    @property
    def stp(self) -> StpConfig:
        return StpConfig(weight=WEIGHT, n_spans=3, start_step=ITERATION, taps=self.taps, seed=STP_SEED)

    @property
    def plain(self) -> Cell:
        """The same model, data and losses in one process: cells that differ in the layout alone share it."""
        return Cell(
            name="plain",
            layers=self.layers,
            data=self.data,
            microbatches=self.microbatches,
            per_token=self.per_token,
            masked=self.masked,
            taps=self.taps,
            prediction=self.prediction,
            model=self.model,
            double=self.double,
        )


# A tensor-parallel product is summed in another order, which the query norm's gradient, a small difference of large
# numbers, shows: in fp32 its error passes 1e-6. The same cells in fp64 tell rounding from a wrong factor.
SPLIT_SUMS = 3e-6
IN_DOUBLE = {"double": True, "microbatches": (4,), "tolerance": 1e-7}

CELLS = (
    Cell(name="PP1", quick=True),
    Cell(name="PP2", pipeline=2, quick=True),
    Cell(name="PP4", pipeline=4),
    Cell(name="PP2 x VPP2", pipeline=2, virtual=2, quick=True),
    Cell(name="PP1, 1 microbatch", microbatches=(1,) * STEPS),
    Cell(name="PP2, 1 microbatch", pipeline=2, microbatches=(1,) * STEPS),
    Cell(name="PP2, 1, 2, 4 microbatches", pipeline=2, microbatches=(1, 2, 4)),
    Cell(name="PP2, tap on first stage", pipeline=2, taps=(1,)),
    Cell(name="PP4, tap on a middle stage", pipeline=4, taps=(6,)),
    Cell(name="PP2, tap on last layer", pipeline=2, taps=(10,)),
    Cell(name="PP2, taps unevenly on stages", pipeline=2, taps=(1, 2, 3, 9)),
    Cell(name="PP2, no experts", pipeline=2, layers=NO_EXPERTS),
    Cell(name="PP2, experts' losses", pipeline=2, model=EXPERT_LOSSES, microbatches=(4,)),
    Cell(name="PP2, multi-token prediction", pipeline=2, prediction="E-"),
    Cell(name="PP2, multi-token prediction, full recomputation", pipeline=2, prediction="E-", settings=BLOCK),
    Cell(name="PP2, loss scale 1024", pipeline=2, loss_scale=1024.0),
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
        loss_scale=1024.0,
    ),
    Cell(name="PP2, full recomputation, uniform", pipeline=2, settings=UNIFORM, quick=True),
    Cell(name="PP2, full recomputation, block", pipeline=2, settings=BLOCK),
    Cell(name="PP2 x VPP2, full recomputation", pipeline=2, virtual=2, settings=UNIFORM),
    Cell(name="TP2 + SP, full recomputation", tensor=2, sequence_parallel=True, settings=UNIFORM, tolerance=SPLIT_SUMS),
    Cell(name="CP2, full recomputation", context=2, layers=POSITION_WISE, settings=UNIFORM),
    Cell(name="per token, PP2, full recomputation", pipeline=2, settings=UNIFORM, per_token=True, masked=True),
    Cell(name="PP2, selective recomputation", pipeline=2, settings=SELECTIVE),
)


def cell(name: str) -> Cell:
    """The cell of that name."""
    (found,) = (candidate for candidate in CELLS if candidate.name == name)
    return found
