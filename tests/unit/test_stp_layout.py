"""Who holds a position: each rank's answer against the lists of positions that Megatron's splits give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpp_stp.stp.layout import SequenceLayout, reference_positions


def layouts(tensor, context):
    for tensor_rank in range(tensor):
        for context_rank in range(context):
            yield SequenceLayout(
                tensor_size=tensor, tensor_rank=tensor_rank, context_size=context, context_rank=context_rank
            )


@given(tensor=st.integers(1, 5), context=st.integers(1, 5), held=st.integers(1, 7))
def test_every_position_has_one_owner_who_finds_it(tensor, context, held):
    length = held * tensor * (2 * context if context > 1 else 1)
    position = torch.randperm(length).reshape(1, -1)
    owners = torch.zeros_like(position)
    for layout in layouts(tensor, context):
        held_here = reference_positions(layout, length)
        local, mine = layout.locate(position, length=length)
        assert local.shape == mine.shape == position.shape
        assert layout.whole(len(held_here)) == length
        assert [held_here[place] for place in local[mine].tolist()] == position[mine].tolist()
        assert set(position[mine].tolist()) == set(held_here)
        assert (local[~mine] == 0).all()
        owners += mine
    assert (owners == 1).all()


def test_context_chunks_are_in_zigzag_and_tensor_shards_inside_of_them():
    held = {(layout.context_rank, layout.tensor_rank): reference_positions(layout, 16) for layout in layouts(2, 2)}
    assert held == {(0, 0): [0, 1, 2, 3], (0, 1): [12, 13, 14, 15], (1, 0): [4, 5, 6, 7], (1, 1): [8, 9, 10, 11]}


def test_upstream_splits_over_context_ranks_like_that():
    from megatron.core import utils

    batch = {"tokens": torch.arange(24).repeat(2, 1), "cu_seqlens": None}
    for layout in layouts(1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda group: 3)
            patch.setattr(torch.distributed, "get_rank", lambda group, layout=layout: layout.context_rank)
            mine = utils.get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=object())
        assert mine["tokens"][1].tolist() == reference_positions(layout, 24)


def test_what_another_rank_holds_is_not_read(monkeypatch):
    """What stands in its place is this rank's position 0, which may be anything."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    layout = SequenceLayout(tensor_size=2, group=object())
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    assert layout.share(rows, torch.tensor([True, False])).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert torch.isnan(rows[1, 0])  # the caller's are left alone


def test_a_rank_that_holds_all_talks_to_nobody():
    rows = torch.randn(3, 2)
    assert SequenceLayout().share(rows, torch.ones(3, dtype=torch.bool)) is rows
