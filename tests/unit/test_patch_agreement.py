"""Ranks that differ are named, and what a run does not call is an error."""

from __future__ import annotations

from typing import Any

import pytest

from megacpp_stp.patches.agreement import digest, gather, require_agreement, require_called
from megacpp_stp.patches.ledger import load_ledger
from megacpp_stp.patches.records import PatchRefused
from megacpp_stp.patches.registry import Registry
from megacpp_stp.runs.receipt import patch_facts
from tests.parity._gloo import run_ranks

LEDGER = load_ledger()
HELPERS = "megatron.training.initialize:_compile_dependencies"
SETUP = "megatron.training.training:setup_model_and_optimizer"


def record(**more: Any) -> dict[str, Any]:
    return {
        "id": "dataset-helpers",
        "state": "active",
        "core_version": "0.19.2",
        "reviewed_at": "0.19.2",
        "unreviewed": [],
        "found": {"a:b": "1"},
        "code": "c",
        "probe": "error 1e-7",
        **more,
    }


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"core_version": "0.19.3"}, 'core_version of dataset-helpers is "0.19.3", with them "0.19.2"'),
        ({"found": {"a:b": "2"}}, "found of dataset-helpers"),
        ({"code": "d"}, "code of dataset-helpers"),
        ({"unreviewed": ["a:b"]}, "unreviewed of dataset-helpers"),
        ({"state": "applied"}, "state of dataset-helpers"),
    ],
)
def test_the_odd_rank_is_named_with_what_differs(more, what):
    with pytest.raises(PatchRefused, match="rank 1 of 3 differs from the others") as caught:
        require_agreement([[record()], [record(**more)], [record()]])
    assert what in str(caught.value)


def test_the_majority_is_right_and_of_two_the_first():
    other = [record(code="d")]
    with pytest.raises(PatchRefused, match="rank 0 of 3 differs"):
        require_agreement([other, [record()], [record()]])
    with pytest.raises(PatchRefused, match="ranks 1, 3 of 5 differ"):
        require_agreement([[record()], other, [record()], other, [record()]])
    with pytest.raises(PatchRefused, match="rank 1 of 2 differs"):
        require_agreement([[record()], other])
    with pytest.raises(PatchRefused, match="it has none, they have dataset-helpers"):
        require_agreement([[record()], [record()], []])


def test_equal_ranks_agree_whatever_their_probes_measured():
    require_agreement([[record()], [record(probe="error 2e-7")], [record()]])
    require_agreement([[], []])
    assert digest([record()]) == digest([record(probe=None)]) != digest([record(code="d")])


def test_what_must_be_called_on_some_rank():
    require_called(LEDGER, [{"dataset-helpers": {HELPERS: 1}}, {"dataset-helpers": {}}])
    with pytest.raises(PatchRefused, match=f"{HELPERS} did not call it in the first iteration: no rank"):
        require_called(LEDGER, [{"dataset-helpers": {"somebody:else": 1}}, {"dataset-helpers": {}}])


def test_what_must_be_called_on_every_rank():
    called = {"fp32-groups": {SETUP: 1}}
    require_called(LEDGER, [called, called])
    other = {"fp32-groups": {"megatron.training.argument_utils:pretrain_cfg_container_from_args": 1}}
    with pytest.raises(PatchRefused, match=f"{SETUP} did not call it in the first iteration: not on rank 1, 2"):
        require_called(LEDGER, [called, other, other])


def test_a_receipt_says_who_called_and_what_was_not_reviewed():
    calls = [{"dataset-helpers": {HELPERS: 1}}, {"dataset-helpers": {}}]
    (fact,) = patch_facts([[record()], [record()]], calls)
    assert fact == {
        "id": "dataset-helpers",
        "state": "active",
        "reviewed_at": "0.19.2",
        "probe": "error 1e-7",
        "called_on_ranks": {HELPERS: [0]},
    }
    (loud,) = patch_facts([[record(unreviewed=["a:b"], reviewed_at=None)]])
    assert loud == {
        "id": "dataset-helpers",
        "state": "active, unreviewed",
        "reviewed_at": None,
        "probe": "error 1e-7",
        "unreviewed": ["a:b"],
    }


def compare(odd: int) -> tuple[str, str]:
    """On each rank: activate, let one rank's upstream be another, and compare."""
    import torch.distributed as dist

    with Registry.load().activate({"patches": ["dataset-helpers"]}) as active:
        mine = [record.as_dict() for record in active.records]
        same = gather(mine)
        require_agreement(same)
        if dist.get_rank() == odd:
            mine[0]["found"] = dict.fromkeys(mine[0]["found"], "0" * 64)
        try:
            require_agreement(gather(mine))
        except PatchRefused as error:
            return mine[0]["state"], str(error)
    return mine[0]["state"], "agreed"


def test_real_ranks_all_refuse_the_odd_one():
    for state, said in run_ranks(compare, 2, 1):
        assert state == "active"
        assert said.startswith("patches: rank 1 of 2 differs from the others: found of dataset-helpers")
