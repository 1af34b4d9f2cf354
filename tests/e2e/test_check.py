"""`check`: upstream's parser and validator on the real argv."""

import json

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.training import upstream_check
from megacpp_stp.training.upstream_check import Derived


def test_the_recipe_is_accepted_and_what_megatron_derives_is_shown(cli):
    done = cli("check", "nam56r-tiny", "--device", "cpu", "--format", "json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["accepted"]
    derived = {row["name"]: row for row in verdict["derived"]}
    # The layer count comes from the pattern, and microbatches from the batch sizes.
    assert derived["num_layers"]["after"] == "12"
    assert derived["data_parallel_size"]["after"] == "1"
    assert not [row for row in verdict["derived"] if row["option"]]
    assert "accepts the arguments" in cli("check", "nam56r-tiny").stdout


def test_a_value_that_megatron_would_change_stops_a_launch(monkeypatch):
    changed = [Derived("warmup", "None", "", ""), Derived("lr_warmup_iters", "30", "20", "--lr-warmup-iters")]
    monkeypatch.setattr(upstream_check, "ask_upstream", lambda plan: changed)
    with pytest.raises(UserError, match="changes it to 20") as caught:
        upstream_check.require_accepted(build_plan(load_recipe("nam56r-tiny")))
    assert caught.value.field == "--lr-warmup-iters"


@pytest.mark.parametrize(
    ("token", "name"), [("--lr=3", "lr"), ("--no-rope-fusion", "apply_rope_fusion"), ("--nam-stp-taps", "nam_stp_taps")]
)
def test_changes_are_traced_to_the_option_that_asked(token, name):
    rows = upstream_check._changes({name: "a"}, {name: "b"}, options=upstream_check._options([token]))
    assert [row["option"] for row in rows] == [token.split("=")[0]]
