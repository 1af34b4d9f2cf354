"""What a rank decides before Megatron runs."""

import pytest
import torch

from megacpp_stp.training.entry import rank_device


@pytest.mark.parametrize("local_rank", [0, 3])
def test_a_cuda_rank_takes_its_own_gpu_before_megatron_sets_one(monkeypatch, local_rank):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert rank_device("cuda") == torch.device("cuda", local_rank)
    assert rank_device("cpu") == torch.device("cpu")
