"""One object of metrics.jsonl, typed: what docs/metrics.schema.json is generated from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megacpp_stp.runs.receipt_model import Count, NotNegative, Number, Part, Share

TapName = Annotated[str, Field(pattern=r"^([1-9]\d*|final-norm)$")]
FamilyName = Annotated[str, Field(pattern=r"^([AMER]|final-norm)$")]
StpLoss = Annotated[float, Field(ge=0, le=2.001)]  # 2, and what rounding adds
Straightness = Annotated[float, Field(ge=-1.001, le=1)]


class MetricsRecord(Part):
    """One iteration. A number that is not finite is null."""

    iteration: Annotated[int, Field(ge=1, lt=2**53)]
    """As on Megatron's console: the first is 1."""
    lm_loss: Number | None
    """Cross entropy, nats a token, mean over the global batch."""
    bits_per_byte: Number | None
    """The same in bits a byte of text."""
    stp_loss: StpLoss | None = None
    """STP before its weight; this and what follows is there with STP only. Null where no span counted."""
    stp_weight: NotNegative | None = None
    """Of this iteration: 0 before the gate."""
    stp_weighted: Number | None = None
    """`stp_weight` times `stp_loss`."""
    stp_active: bool | None = None
    """Whether this iteration's gradient had the STP term."""
    stp_loss_by_tap: dict[TapName, StpLoss | None] | None = None
    """By Megatron's layer number, or `final-norm`."""
    stp_straightness_by_tap: dict[TapName, Straightness | None] | None = None
    """1 minus the loss of each tap."""
    stp_straightness_by_family: dict[FamilyName, Straightness | None] | None = None
    """Its mean over the taps of each family."""
    stp_valid_fraction: Share | None = None
    """Share of spans that counted."""
    stp_valid_fraction_by_tap: dict[TapName, Share | None] | None = None
    """The same by tap."""
    stp_effective_rank_by_tap: dict[TapName, NotNegative | None] | None = None
    """Of the diagnosis, in the iterations that have one."""
    stp_clock_share_by_tap: dict[TapName, Number | None] | None = None
    """Likewise."""
    stp_gradient_share_by_tap: dict[TapName, Number | None] | None = None
    """Likewise."""
    grad_norm: NotNegative | None
    """Global, before clipping; null when the step was skipped."""
    learning_rate: NotNegative
    """Of this step."""
    loss_scale: NotNegative
    """Of this step."""
    skipped: bool
    """Whether the optimizer refused the step."""
    nonfinite: Literal["lm_loss", "stp_loss", "gradient"] | None
    """What was not finite in a step that was skipped for it; null else."""
    tokens: Count
    """Of the global batch."""
    loss_tokens: Count
    """Those that the loss mask counts."""
    step_time_s: NotNegative
    """First microbatch's data to the end of the optimizer step, on rank 0."""
    tokens_per_s: NotNegative
    """Of all ranks together."""
    tflops_per_gpu: NotNegative | None
    """Model TFLOP/s of one process."""
    mfu: NotNegative | None
    """The same as a share of the GPU's dense bf16 peak; null where that is not known."""
    goodput: Share
    """Share of the wall time since the run first began that went into iterations which count."""
    skipped_iterations: Count
    """How many steps were skipped so far."""
    nonfinite_iterations: Count
    """How many of them since something was not finite."""
    peak_memory_bytes: Count
    """Largest over ranks."""
