"""The fused loss against Megatron's own: ColumnParallelLinear and vocab_parallel_cross_entropy, and whole models."""

import pytest
import torch

from tests.parity._gloo import Layout, run_ranks
from tests.parity.flce_work import Case, Model, all_of_them

FP32, BF16 = torch.float32, torch.bfloat16
ONE_RANK = [
    Case(FP32),
    Case(FP32, spread=3.0),
    Case(FP32, frozen=True),
    *(Case(BF16, spread=spread) for spread in (0.02, 0.3, 3.0)),
]
TWO_RANKS = [
    Case(dtype, sequence_parallel=parallel, frozen=frozen)
    for dtype in (FP32, BF16)
    for parallel in (False, True)
    for frozen in (False, True)
]
MODELS = [
    Model(),
    Model(tied=True),
    Model(detached=True, mup=True),
    Model("gpt"),
    Model("gpt", tied=True, detached=True),
]
PARALLEL_MODELS = [Model(), Model(sequence_parallel=True), Model(tied=True, mup=True, sequence_parallel=True)]


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(all_of_them, 1, ONE_RANK, MODELS, True, timeout=300)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(all_of_them, 2, TWO_RANKS, PARALLEL_MODELS, False, layout=Layout(tensor=2), timeout=300)


def check_operation(case, errors):
    assert errors.keys() == ({"loss", "hidden"} if case.frozen else {"loss", "hidden", "weight"})
    for name, (to_megatron, ours, megatrons) in errors.items():
        if case.dtype is FP32:
            assert to_megatron <= 1e-6, name
            assert ours <= 1.1 * megatrons + 1e-8, name
        else:
            assert ours <= 1.01 * megatrons, name


@pytest.mark.parametrize("number", range(len(ONE_RANK)), ids=lambda number: str(ONE_RANK[number]))
def test_the_operation(one_rank, number):
    check_operation(ONE_RANK[number], one_rank[0][0][number])


@pytest.mark.parametrize("number", range(len(TWO_RANKS)), ids=lambda number: str(TWO_RANKS[number]))
def test_the_operation_on_two_ranks(two_ranks, number):
    for operations, *_ in two_ranks:
        check_operation(TWO_RANKS[number], operations[number])


def check_model(found):
    assert found["calls"] == 3  # main head and two heads of multi-token prediction
    assert found["names"] and not found["no gradient"]
    assert max(found["errors"].values()) <= 1e-6, found["errors"]
    before, after = found["correct"]
    assert torch.equal(before, after) and before.min() > 0
    assert max(found["not training"]) <= 1e-6
    # In evaluation the three again, and without labels the two prediction heads, which take theirs from the tokens.
    assert found["undone"] and found["calls after"] == 3 + 3 + 2


@pytest.mark.parametrize("number", range(len(MODELS)), ids=lambda number: str(MODELS[number]))
def test_models(one_rank, number):
    check_model(one_rank[0][1][number])


@pytest.mark.parametrize("number", range(len(PARALLEL_MODELS)), ids=lambda number: str(PARALLEL_MODELS[number]))
def test_models_on_two_ranks(two_ranks, number):
    for _, models, _ in two_ranks:
        check_model(models[number])


def test_models_that_it_cannot_serve(one_rank):
    said = one_rank[0][2]
    assert "is a megacpp_stp.flce.megatron.FusedOutputLayer" in said["twice"]
    assert "is another fusion" in said["cross_entropy_loss_fusion"]
    assert "add it" in said["gradient_accumulation_fusion"]
    assert len(said) == 7
