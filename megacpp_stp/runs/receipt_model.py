"""All that receipt.json holds, typed: what docs/receipt.schema.json is generated from, and tests hold real runs to.

Readers do not go through it: a receipt may be of an earlier version or damaged, and they check what they use.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megacpp_stp.recipe.schema import Mtp, Stp

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = float
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
Name = Annotated[str, Field(pattern=r"^\S.*$")]
Layer = Annotated[str, Field(pattern=r"^[1-9]\d*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
Tap = Annotated[int, Field(ge=1)] | Literal["final-norm"]
Window = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
Status = Literal["complete", "incomplete"]


class Part(BaseModel):
    """An object of a run's file: strict, no unknown name, no NaN."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Attempt(Part):
    """One start of the run."""

    started: Time
    ended: Time | None
    """Null where it was killed together with its launcher."""
    from_iteration: Count
    """Of the checkpoint that it loaded; 0 for none."""
    status: Status
    reason: str | None
    iterations_done: Count | None
    exit_status: int | None
    plan_digest: Sha256


class RecipeName(Part):
    """Which recipe."""

    name: Name
    provenance: Name
    overrides: list[str]
    """What `--set` changed; a value that names a place of the machine is left out."""


class Spec(Part):
    """What the model was built from."""

    module: Name
    name: Name
    backend: Literal["torch", "te"]
    kernels: dict[Annotated[str, Field(pattern="^[AMER]$")], Name]
    """By family, what runs its recurrence."""


class Code(Part):
    """Which code of ours ran."""

    version: Name
    sha256: Sha256
    """Over all Python files of the package."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None
    """Of the git work tree that tracks the package; null where none does."""
    modified: bool | None
    """Whether the package differed from that commit."""


class Pattern(Part):
    """The hybrid pattern."""

    source: Name
    """In the family's letters."""
    megatron: Name
    """As Megatron's `--hybrid-layer-pattern`."""
    stand_ins: dict[Layer, Name]
    """By layer number, what runs there in another block's place."""
    seams: dict[Layer, Name]
    """By layer number, which block of ours runs in a slot of Megatron's."""


class AuxiliaryLosses(Part):
    """What was asked for. `collected` says what there really was."""

    stp: Stp | None
    moe_load_balancing: NotNegative | None
    """Coefficient; null without experts."""
    moe_z_loss: NotNegative | None
    """Coefficient; null without experts."""
    mtp: Mtp | None
    dsa_indexer: NotNegative | None
    """Coefficient of the loss of sparse attention's indexer; null without sparse attention."""


class Regimes(Part):
    """First and last iteration of each regime of STP, as planned; null for one that there is none of."""

    dormant: Window | None
    warming: Window | None
    active: Window | None


class StpIterations(Part):
    """Iterations by what each of them says that it did."""

    dormant: Count
    """Measured, without the STP term in the gradient."""
    warming: Count
    """With a part of the weight."""
    active: Count
    """With all of the weight."""
    without_a_span: Count
    """Of all these, those in which no span counted."""


class Collected(Part):
    """Auxiliary losses that the first iteration of this attempt really had."""

    taps: list[Tap] | None
    """STP's taps that were fed, all ranks together; null without STP."""
    auxiliary: dict[Name, list[Count]]
    """Megatron's own, by the name in its log: the ranks whose layers collected one other than 0."""


class Topology(Part):
    """How the model is cut."""

    world_size: Count
    data_parallel: Count
    tensor: Count
    pipeline: Count
    virtual: Count
    context: Count
    expert: Count
    micro_batches: Count
    """A step, on each data-parallel rank."""


class Node(Part):
    """One machine, without its name."""

    ranks: list[Count]
    devices: list[Name]
    clock_skew_s: Number
    """Of its clock from node 0's."""


class Placement(Part):
    """Where the ranks ran."""

    nodes: list[Node]


class Seeds(Part):
    """Of the random streams."""

    training: Count
    stp: Count | None


class Patch(Part):
    """A patch surface, with its proof."""

    id: Name
    state: Name
    """`active`: fingerprints equal, all places replaced, probe passed, called in the first iteration."""
    reviewed_at: Name | None
    """Reviewed version of megatron-core that the installed one equals."""
    probe: str | None
    """What its probe showed."""
    unreviewed: list[Name] = []
    """What upstream has that nobody reviewed and the user allowed."""
    called_on_ranks: dict[Name, list[Count]] = {}
    """By calling function upstream; not there before the first iteration."""


class Hardware(Part):
    """What it ran on."""

    device: Literal["cpu", "cuda"]
    machine: Name
    cpu_count: Count | None
    gpu: Name | None = None
    cuda: Name | None = None
    nccl: Name | None = None
    driver: Name | None = None


class Substrate(Part):
    """Hardware and software."""

    hardware: Hardware
    python: Name
    megacpp_stp: Name
    packages: dict[Name, Name]


class Split(Part):
    """One split of the data, by content."""

    tokens: Count
    documents: Count
    bin_sha256: Sha256


class Splits(Part):
    """Both splits."""

    train: Split
    valid: Split


class Tokenizer(Part):
    """By content."""

    vocab_size: Count
    sha256: Sha256


class Data(Part):
    """What the run read, by content."""

    splits: Splits
    tokenizer: Tokenizer
    source_sha256: Sha256


class Parameters(Part):
    """How many parameters the built model has."""

    total: Count
    by_pipeline_rank: list[Count]


class FusedCrossEntropy(Part):
    """The loss without its logits."""

    backend: Name
    losses_in_first_iteration: Count


class Evaluation(Part):
    """One evaluation on the validation split."""

    iteration: Count
    lm_loss: Number
    bits_per_byte: Number


class Last(Part):
    """The last iteration."""

    iteration: Count
    lm_loss: Number | None = None
    bits_per_byte: Number | None = None
    stp_loss: Number | None = None
    peak_memory_bytes: Count | None = None


class Totals(Part):
    """Of the run, those before a restart included; what was done twice counts once."""

    iterations: Count
    tokens: Count
    loss_tokens: Count
    """Those that the loss mask counts."""
    skipped_iterations: Count
    """Those whose step the optimizer refused."""
    nonfinite_iterations: Count
    """Those of them with a loss, an STP loss or a gradient that was not finite."""
    training_time_s: NotNegative
    """Sum of `step_time_s`."""
    wall_time_s: NotNegative
    """Since the run first began."""
    goodput: Share
    """Share of `wall_time_s` that went into iterations which were not skipped."""


class Exit(Part):
    """As exit.json."""

    status: int
    torchrun_returncode: int | None
    signal: Name | None
    other_nodes: dict[Layer, dict[Name, Any]] = {}


class ReceiptModel(Part):
    """receipt.json."""

    receipt_version: Literal[2]
    status: Status
    """`incomplete` until the last iteration is done."""
    reason: str | None
    """Why it is incomplete."""
    failure_kind: Name | None
    """`user`, `crash`, `signal`...; null while the run goes on, and for one that is complete."""
    started: Time
    updated: Time
    """When this was last written: while the run goes on, at least every ten seconds in which an iteration ends."""
    ended: Time | None
    attempts: Annotated[list[Attempt], Field(min_length=1)]
    plan_digest: Sha256
    recipe: RecipeName
    spec: Spec
    stack: Name | None
    """The class that the spec built as decoder."""
    code: Code | None
    pattern: Pattern
    patches: list[Patch] | None
    patches_digest: Sha256 | None
    """Over the records in patches.json, equal on all ranks."""
    allowed_unreviewed: list[Name]
    """Surfaces that the user let meet unreviewed code."""
    cpu_backend: list[Name] | None
    """What was asked of the CPU backend; null on a GPU."""
    auxiliary_losses: AuxiliaryLosses
    windows: Regimes | None
    """Null without STP."""
    collected: Collected | None
    stp_iterations: StpIterations | None
    """Null without STP."""
    fused_cross_entropy: FusedCrossEntropy | None
    topology: Topology
    placement: Placement | None
    substrate: Substrate | None
    environment: dict[Variable, str] | None = None
    """Of rank 0, what is set of the variables that change what is computed or how, without secrets, hosts and places.
    Receipts of earlier runs have none."""
    data: Data | None
    seeds: Seeds
    parameters: Parameters | None
    iterations_planned: Count
    iterations_done: Count | None
    """Null before the first attempt came to its first iteration."""
    last: Last | None
    totals: Totals | None
    validation: list[Evaluation]
    best: Evaluation | None
    """The lowest validation loss; null where nothing was evaluated."""
    weights_sha256: Sha256 | None
    """Of the weights after the last iteration; equal bits in an equal layout give an equal digest."""
    exit: Exit | None
