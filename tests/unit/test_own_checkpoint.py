"""A run goes on from checkpoints that its own plans wrote."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.training.own_checkpoint import mark, require_own

FOLDER = "checkpoints/iter_0000100"
FIRST, LONGER, OTHER = (
    build_plan(load_recipe("nam56r-tiny", overrides), device="cpu").as_dict()
    for overrides in ((), ("training.iterations=400",), ("training.seed=7",))
)


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """Go on from iteration 100, from a checkpoint of a plan; None for one that does not say."""
    Receipt.create(tmp_path, plan_facts(FIRST)).begin_attempt(from_iteration=100, **plan_facts(LONGER))
    dcp.save({"weight": torch.ones(1000)}, checkpoint_id=tmp_path / FOLDER)

    def from_one_of(plan):
        args = SimpleNamespace(seed=1)
        if plan is not None:
            mark(args, plan["digest"])
        asked = []
        monkeypatch.setattr(
            serialization, "load_common_state_dict", lambda folder: asked.append(folder) or {"args": args}
        )
        try:
            require_own(tmp_path)
        finally:
            assert asked in ([], [tmp_path / FOLDER])

    return from_one_of


@pytest.mark.parametrize("plan", [FIRST, LONGER, None], ids=["first", "changed since", "of an older version"])
def test_a_checkpoint_of_this_run_is_taken(going_on, plan):
    going_on(plan)


def test_a_checkpoint_of_another_plan_is_refused(going_on):
    with pytest.raises(UserError, match="iteration 100 was written by another plan") as caught:
        going_on(OTHER)
    assert OTHER["digest"][:12] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("__0_0.distcp", 100, "__0_0.distcp of iter_0000100 has 100 bytes of "),
        ("__0_0.distcp", None, "__0_0.distcp of iter_0000100 has 0 bytes of "),
        (".metadata", 20, "iteration 100 cannot be read: "),
        (".metadata", None, "iteration 100 cannot be read: FileNotFoundError"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_words(going_on, tmp_path, name, size, says):
    path = tmp_path / FOLDER / name
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        going_on(FIRST)
    assert "move it away to go on from an earlier one" in caught.value.fix
