"""Runs that are unlike are refused or labelled, and what does not make them so."""

import pytest

from megacpp_stp.runs.files import read_json, write_json
from tests.unit.made_runs import (
    CODE,
    DATA,
    SUBSTRATE,
    answer,
    changed,
    compare,
    make_run,
    refused,
)

WITHOUT = "stp=null"


UNLIKE = {
    "other cores": ("substrate", (), changed(SUBSTRATE, ["hardware", "cpu_count"], 4), DATA),
    "other torch": ("substrate", (), changed(SUBSTRATE, ["packages", "torch"], "2.16.0"), DATA),
    "other GPU": ("substrate", (), changed(SUBSTRATE, ["hardware", "gpu"], "H200"), DATA),
    "no substrate": ("substrate", (), None, DATA),
    "other text": ("data", (), SUBSTRATE, changed(DATA, ["splits", "train", "bin_sha256"], "xy")),
    "no data": ("data, tokenizer", (), SUBSTRATE, None),
    "other tokenizer": ("tokenizer", (), SUBSTRATE, changed(DATA, ["tokenizer", "sha256"], "xy")),
    "other pattern": ("pattern", ("model.pattern=AEMEAEMEAEMM", "model.families.R=null"), SUBSTRATE, DATA),
    "other cut": ("parallelism", ("parallel.stages=[6, 6]",), SUBSTRATE, DATA),
    "one stage": (
        "parallelism",
        ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1"),
        SUBSTRATE,
        DATA,
    ),
    "other batch": ("batch", ("training.global_batch_size=4",), SUBSTRATE, DATA),
    "other length": ("batch", ("training.sequence_length=128",), SUBSTRATE, DATA),
}


@pytest.mark.parametrize("case", UNLIKE.values(), ids=UNLIKE)
def test_unlike_runs_are_refused_or_labelled(tmp_path, case):
    kind, overrides, substrate, data = case
    a = make_run(tmp_path / "a", WITHOUT)
    b = make_run(tmp_path / "b", *overrides, substrate=substrate, data=data)
    error = refused("compare", a, b)
    assert f"a and b are unlike in {kind.partition(',')[0]} (" in error.problem
    assert "--allow-unlike" in error.fix
    assert ("bits_per_byte" in error.fix) == ("tokenizer" in kind)
    found = compare(a, b, "--allow-unlike")
    assert found["title"].startswith(f"UNLIKE RUNS ({kind}")
    assert ", ".join(found["pairs"][0]["unlike"]) == kind
    assert not found["pairs"][0]["controlled"]
    assert f"UNLIKE RUNS ({kind}" in answer("compare", a, b, "--allow-unlike").splitlines()[0]


def test_other_code_of_ours_is_unlike(tmp_path):
    """An equal plan under other code may compute something else, also where only an earlier attempt ran it."""
    a, b = make_run(tmp_path / "a", WITHOUT), make_run(tmp_path / "b", code={**CODE, "sha256": "d" * 64})
    c = make_run(tmp_path / "c", code={"sha256": "e" * 64, "commit": "f" * 40, "modified": True})
    assert f"unlike in code (a commit {'b' * 12}, b commit {'b' * 12})" in refused("compare", a, b).problem
    assert f"a commit {'b' * 12}, c commit {'f' * 12} and changes" in refused("compare", a, c).problem
    found = compare(a, b, "--allow-unlike")
    assert found["title"].startswith("UNLIKE RUNS (code)")
    assert not found["pairs"][0]["controlled"]
    went_on = make_run(tmp_path / "went-on")
    (went_on / "attempt-0").mkdir()
    write_json(went_on / "attempt-0" / "receipt.json", {"code": {**CODE, "sha256": "d" * 64}})
    assert "unlike in code (went-on changed it on the way)" in refused("compare", a, went_on).problem
    # None of what it did is left: the next attempt began anew.
    for start, unlike in ((0, False), (20, True)):
        run = make_run(tmp_path / f"from-{start}")
        receipt = read_json(run / "receipt.json")
        (first,) = receipt["attempts"]
        write_json(run / "receipt.json", {**receipt, "attempts": [first, {**first, "from_iteration": start}]})
        (run / "attempt-1").mkdir()
        write_json(run / "attempt-1" / "receipt.json", {"code": {**CODE, "sha256": "d" * 64}})
        if unlike:
            assert "changed it on the way" in refused("compare", a, run).problem
        else:
            compare(a, run)
    compare(a, make_run(tmp_path / "same", code={**CODE, "commit": None, "modified": None}))


def with_environment(run, **variables):
    receipt = read_json(run / "receipt.json")
    write_json(run / "receipt.json", {**receipt, "environment": {"CUDA_VISIBLE_DEVICES": str(run)[-1], **variables}})
    return run


def test_what_a_plan_leaves_to_the_machine_is_compared(tmp_path):
    """`launch.environment: {NAME: null}` in both plans: they are equal, and the runs are not."""
    left = "launch.environment.OMP_NUM_THREADS=null"
    one = with_environment(make_run(tmp_path / "a", WITHOUT, left), OMP_NUM_THREADS="1")
    two = with_environment(make_run(tmp_path / "b", left), OMP_NUM_THREADS="2")
    assert "unlike in substrate (environment.OMP_NUM_THREADS)" in refused("compare", one, two).problem
    found = compare(one, two, "--allow-unlike")
    assert found["title"].startswith("UNLIKE RUNS (substrate)")
    same = with_environment(make_run(tmp_path / "c", left), OMP_NUM_THREADS="1", NCCL_SOCKET_IFNAME="eth7")
    assert compare(one, same)["pairs"][0]["controlled"]
    assert compare(one, make_run(tmp_path / "d", left))["pairs"][0]["controlled"]  # an earlier one, which does not say
    # A plan that sets it is compared as a plan.
    two_threads = "launch.environment.OMP_NUM_THREADS=2"
    planned = with_environment(make_run(tmp_path / "e", two_threads), OMP_NUM_THREADS="2")
    assert "unlike in substrate (env.OMP_NUM_THREADS)" in refused("compare", one, planned).problem
    (same / "attempt-0").mkdir()
    write_json(same / "attempt-0" / "receipt.json", {"environment": {"OMP_NUM_THREADS": "2"}})
    assert "c changed its environment on the way" in refused("compare", one, same).problem


@pytest.mark.parametrize("part", ["substrate", "code", "data"])
def test_what_neither_run_says_is_not_alike(tmp_path, part):
    a, b = make_run(tmp_path / "a", WITHOUT, **{part: None}), make_run(tmp_path / "b", **{part: None})
    assert f"unlike in {part} (a does not say, b does not say)" in refused("compare", a, b).problem


def test_where_tensorboard_and_wandb_write_does_not_matter(tmp_path):
    """Each run has a folder of its own there: two seeds would be two arms, and nothing controlled."""
    runs = [
        make_run(tmp_path / f"{name}{seed}", *stp, f"training.seed={seed}", f"megatron.{flag}=/tb/{name}{seed}")
        for name, flag, stp in (("a", "tensorboard-dir", [WITHOUT]), ("b", "wandb-exp-name", []))
        for seed in (1, 2)
    ]
    found = compare(*runs)
    assert found["title"].startswith("controlled comparison") and found["pairs"][0]["seeds"] == [1, 2]
    other = make_run(tmp_path / "c", WITHOUT, "training.seed=1", "megatron.manual-gc=true")
    assert "megatron.manual-gc" in compare(runs[0], other)["pairs"][0]["standing"]


def test_the_same_data_may_lie_elsewhere(tmp_path):
    a, b = make_run(tmp_path / "a", WITHOUT), make_run(tmp_path / "b", "data.path=data/elsewhere")
    assert compare(a, b)["pairs"][0]["controlled"]
