"""A run goes on from checkpoints that its own plans wrote."""

from types import SimpleNamespace

import pytest
from megatron.core.dist_checkpointing import serialization

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.receipt import Receipt, plan_facts
from megacpp_stp.training.own_checkpoint import mark, require_own

FIRST, LONGER, OTHER = (
    build_plan(load_recipe("nam56r-tiny", overrides), device="cpu").as_dict()
    for overrides in ((), ("training.iterations=400",), ("training.seed=7",))
)


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """Go on from iteration 100, from a checkpoint of a plan; None for one that does not say."""
    Receipt.create(tmp_path, plan_facts(FIRST)).begin_attempt(from_iteration=100, **plan_facts(LONGER))

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
            assert asked == [tmp_path / "checkpoints" / "iter_0000100"]

    return from_one_of


@pytest.mark.parametrize("plan", [FIRST, LONGER, None], ids=["first", "changed since", "of an older version"])
def test_a_checkpoint_of_this_run_is_taken(going_on, plan):
    going_on(plan)


def test_a_checkpoint_of_another_plan_is_refused(going_on):
    with pytest.raises(UserError, match="iteration 100 was written by another plan") as caught:
        going_on(OTHER)
    assert OTHER["digest"][:12] in str(caught.value)
