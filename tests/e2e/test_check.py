"""`check`: upstream's parser and validator on the real argv."""

import json

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import list_recipes, load_recipe
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


# Each takes a process of seconds: one of each kind here, the others in the slow set.
QUICK = ("nam56r-pp2-vpp2", "nam52")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in list_recipes()]
)
def test_every_shipped_recipe_is_accepted(name, cli):
    done = cli("check", name, "--format", "json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["accepted"]
    derived = {row["name"]: row["after"] for row in verdict["derived"]}
    layout = build_plan(load_recipe(name)).layout
    assert derived["num_layers"] == str(len(layout.layers))
    segments = layout.pipeline * layout.virtual
    virtual = derived["virtual_pipeline_model_parallel_size"]
    assert virtual == (str(layout.virtual) if segments > layout.pipeline else "None")


def test_prediction_depths_are_read_back_by_megatron(cli):
    done = cli("check", "nam56r", "--set", "model.mtp={depths: 2, pattern: AE, loss_coeff: 0.1}", "--format", "json")
    assert done.returncode == 0, done.stderr
    derived = {row["name"]: row["after"] for row in json.loads(done.stdout)["derived"]}
    assert "mtp_num_layers" not in derived  # said once, and the same as the pattern says


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("megatron.timing-log-level=9", "invalid choice"),
        ("megatron.log-throughput=3", "unrecognized arguments"),
    ],
)
def test_an_option_that_megatron_does_not_take_is_refused(override, message, cli):
    done = cli("check", "nam56r", "--set", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_two_spellings_of_one_option_are_refused():
    twice = ["--no-dsa-indexer-rotate-activation", "--disable-dsa-indexer-rotate-activation"]
    with pytest.raises(ValueError, match="set the same value"):
        upstream_check._options(twice)


def test_a_plan_with_gaps_is_accepted_and_not_launched(cli):
    done = cli("launch", "nam56r-cp4-12k", "--device", "cuda")
    assert done.returncode == 2
    assert "not launched by this version" in done.stderr
    assert "M2RNN at layers 12 24 36 48 has no context parallelism yet" in done.stderr


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
