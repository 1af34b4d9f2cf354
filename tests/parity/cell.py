"""One cell of the STP parity suite: one way to run a small model, with the same gradient in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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

# A tensor-parallel product is summed in another order, which the query norm's gradient, a small difference of large
# numbers, shows: in fp32 its error passes 1e-6. The same cells in fp64 tell rounding from a wrong factor.
SPLIT_SUMS = 3e-6
IN_DOUBLE: dict[str, Any] = {"double": True, "microbatches": (4,), "tolerance": 1e-12}
TWO_RANKS: dict[str, Any] = {"data": 2, "microbatches": (2,) * STEPS}
SEQUENCE_PARALLEL: dict[str, Any] = {"tensor": 2, "sequence_parallel": True, "tolerance": SPLIT_SUMS}
CONTEXT: dict[str, Any] = {"context": 2, "layers": POSITION_WISE}

# What one process has to share with a layout to be its truth.
_OF_THE_MODEL = (
    "layers",
    "data",
    "microbatches",
    "per_token",
    "masked",
    "skipped",
    "taps",
    "spans",
    "objective",
    "max_span",
    "documents",
    "start",
    "ramp",
    "prediction",
    "model",
    "double",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to run, and what must come out.

    Attributes:
        name: Of the row in the table.
        layers: Megatron's symbols on each of four segments.
        tensor: Tensor-parallel size; likewise the following.
        microbatches: Of one data rank, in each of the steps.
        masked: Some tokens do not count, more on one rank than on another.
        loss_scale: In each of the steps.
        skipped: The step whose loss overflows; Megatron's own scaler then makes the scales. None: they are given.
        taps: Layers, or 0 for the final norm.
        spans: Of a sequence and tap.
        objective: Triples or chords.
        max_span: Window of a triple.
        documents: Whether spans stay inside documents.
        start: First step with STP, counted from 0.
        ramp: Steps over which its weight rises.
        prediction: Layers of one depth of multi-token prediction. They count from 1 again: one has a tap's number.
        settings: Of the transformer configuration, on the schedule's side only.
        model: Of the transformer configuration, on both sides.
        double: In fp64 throughout, see `tests.parity.side.in_double`. Megatron's optimizer has none, so that it is
            gradients only.
        tolerance: Largest relative error of a gradient.
        after: Largest relative error of a parameter after the steps.
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
    loss_scale: tuple[float, ...] = (1.0,) * STEPS
    skipped: int | None = None
    taps: tuple[int, ...] = TAPS
    spans: int = 3
    objective: Literal["triple", "chord"] = "triple"
    max_span: int | None = None
    documents: bool = False
    start: int = 0
    ramp: int = 0
    prediction: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    double: bool = False
    tolerance: float = 1e-6
    after: float = 1e-6
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
        return StpConfig(
            weight=WEIGHT,
            n_spans=self.spans,
            start_step=ITERATION + self.start,
            taps=self.taps,
            seed=STP_SEED,
            objective=self.objective,
            max_span=self.max_span,
            within_documents=self.documents,
            ramp_steps=self.ramp,
        )

    @property
    def plain(self) -> Cell:
        """The same model, data and losses in one process: cells that differ in the layout alone share it."""
        return Cell(name="plain", **{name: getattr(self, name) for name in _OF_THE_MODEL})
