"""What a plan says it cannot run yet, and which patches it asks for."""

from __future__ import annotations

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe

MAMBA3 = "model.families.M={block: mamba3, heads: 4, head_dim: 64, state_dim: 16, groups: 2, chunk_size: 16, "
MAMBA3 += "complex_rotation: false, mimo_rank: 1, kernel: torch}"
M2RNN = (
    "model.families.R={block: m2rnn, heads: 4, key_dim: 16, value_dim: 8, conv_kernel: 4, checkpoint_every: 16, "
    "kernel: torch}"
)
SPARSE = (
    "model.families.A.sparse={ranks: [1, 2], indexer_heads: 2, indexer_head_dim: 32, topk: 16, "
    "kernel: upstream, loss: dense, loss_coeff: 0.01}"
)
MTP = "model.mtp={depths: 1, pattern: AE, loss_coeff: 0.1}"
STAND_IN = "model.families.{0}={{block: stand-in, runs: mlp, instead_of: {1}}}"
REAL = (MAMBA3, M2RNN, SPARSE, MTP)
BF16 = ("training.precision=bf16", "training.checkpoint=null")


def plan(*overrides: str, name: str = "nam56r-tiny"):
    return build_plan(load_recipe(name, overrides), device="cpu" if name.startswith("nam56r-tiny") else "cuda")


def fields(*overrides: str, name: str = "nam56r-tiny"):
    return [gap.field for gap in plan(*overrides, name=name).gaps]


def test_every_letter_runs_in_the_torch_backend():
    assert fields(*REAL) == []
    assert fields(*REAL, *BF16) == []


MAMBA2 = "model.families.M={block: mamba2, heads: 80, head_dim: 64, state_dim: 128, groups: 8}"


@pytest.mark.parametrize("overrides", [(), (MAMBA2,)])
def test_transformer_engine_is_no_gap_and_runs_on_gpus_only(overrides):
    assert fields(*overrides, name="nam52") == []
    with pytest.raises(UserError, match="run on GPUs only") as caught:
        build_plan(load_recipe("nam52", overrides), device="cpu")
    assert caught.value.field == "model.backend"


def test_mamba2_needs_transformer_engine():
    with pytest.raises(UserError, match="Megatron's Mamba-2 mixer") as caught:
        plan(MAMBA2.replace("80", "8"))
    assert caught.value.field == "model.families.M.block"


def test_the_layers_of_mamba2_are_in_the_arguments():
    argv = plan(MAMBA2, name="nam52").argv
    numbers = argv[argv.index("--nam-mamba2-layers") + 1].split(",")
    assert numbers == [str(number) for number in range(5, 87, 5)]
    assert "--nam-mamba3-layers" not in argv


def test_a_recurrence_has_no_context_parallelism():
    gaps = plan(*REAL, "parallel.context=2", "launch.processes_per_node=4", "stp=null").gaps
    found = [gap.what for gap in gaps if gap.field == "parallel.context"]
    assert "Mamba-3 at layers 3 7 11 has no context parallelism yet" in found
    assert "M2RNN at layers 12 has no context parallelism yet" in found


FOUR = "launch.processes_per_node=4"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((FOUR, "parallel.tensor=2", "parallel.sequence_parallel=true"), []),
        ((FOUR, "parallel.expert=2"), []),
        (("training.recompute={granularity: full, modules: []}",), []),
        (
            (
                *(FOUR, "parallel.tensor=2", "parallel.sequence_parallel=true"),
                "training.recompute={granularity: full, modules: []}",
            ),
            ["training.recompute"],
        ),
    ],
)
def test_what_is_proven_is_no_gap(overrides, expected):
    assert fields(*overrides) == expected


def test_what_needs_sequence_parallelism_is_a_gap_without():
    overrides = (FOUR, "parallel.tensor=2", "model.pattern=AMMMAMMMAMMR", "model.families.E=null")
    assert fields(*overrides) == ["parallel.sequence_parallel"]
    assert fields(*overrides, "model.families.A.sparse=null") == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((*REAL, *BF16), ("dataset-helpers", "fp32-groups")),
        (REAL, ("dataset-helpers",)),
        ((STAND_IN.format("M", "mamba3"), STAND_IN.format("R", "m2rnn"), *BF16), ("dataset-helpers", "dsa-memory")),
        (("model.families.A.sparse.kernel=upstream",), ("dataset-helpers",)),
        (("model.families.A.sparse=null",), ("dataset-helpers",)),
    ],
)
def test_a_plan_asks_for_the_patches_that_it_needs(overrides, expected):
    assert plan(*overrides).patches == expected
