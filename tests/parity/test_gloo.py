"""What `run_ranks` promises about ranks that do not return."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.parity._gloo import RankFailed, run_ranks


def only_rank_one_fails(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "raise":
            raise KeyError("no such layer")
        os._exit(3)
    time.sleep(600)


@pytest.mark.parametrize(("how", "message"), [("raise", "KeyError: 'no such layer'"), ("die", "died without a word")])
def test_a_failing_rank_ends_the_others_and_says_why(how, message):
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(only_rank_one_fails, 2, how, timeout=300)
    assert str(caught.value).startswith("rank 1: ")
    assert message in str(caught.value)
    assert time.monotonic() - started < 120


@pytest.mark.slow
def test_ranks_that_hang_are_killed():
    with pytest.raises(RankFailed, match=r"ranks \[0\] had not returned after 15 s"):
        run_ranks(time.sleep, 1, 600, timeout=15)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor * (1 + torch.distributed.get_rank())
    torch.distributed.all_reduce(tensor)
    return tensor


@pytest.mark.slow
def test_tensors_go_in_and_come_back():
    results = run_ranks(sum_over_ranks, 2, torch.tensor([1.0, 2.0]))
    assert [result.tolist() for result in results] == [[3.0, 6.0], [3.0, 6.0]]
