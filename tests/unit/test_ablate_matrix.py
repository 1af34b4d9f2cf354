"""Matrix files: what is read, what is refused and where, and which runs are planned in which order."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megacpp_stp.ablate.cells import plan_runs
from megacpp_stp.ablate.matrix import read_matrix
from megacpp_stp.cli.app import build_app
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from tests.unit.made_matrix import CONTENT, planned, write_matrix
from tests.unit.test_structure import ROOT

SPANS = CONTENT["factors"]["spans"]


def test_cells_are_all_combinations_and_runs_go_seed_by_seed(tmp_path):
    _, runs = planned(tmp_path)
    cells = ["spans=1,gate=early", "spans=1,gate=late", "spans=3,gate=early", "spans=3,gate=late"]
    assert [(run.cell, run.seed) for run in runs] == [(cell, seed) for seed in (1, 2, 3) for cell in cells]
    assert runs[5].directory == tmp_path / "runs" / "spans=1,gate=late" / "2"


def test_a_plan_is_the_one_that_launch_would_make(tmp_path):
    _, runs = planned(tmp_path)
    settings = [*CONTENT["set"], "stp.n_spans=3", "training.seed=2", "stp.seed=2"]
    run = next(run for run in runs if (run.cell, run.seed) == ("spans=3,gate=early", 2))
    assert run.plan.digest == build_plan(load_recipe("nam56r-tiny", settings), device="cpu").digest
    assert (run.plan.recipe.training.seed, run.plan.recipe.stp.seed) == (2, 2)


def test_a_cell_without_stp_has_no_seed_of_it_and_a_level_wins_over_what_all_cells_have(tmp_path):
    factors = {"stp": {"none": ["stp=null"], "all": ["optimizer.warmup_iterations=5"]}}
    _, runs = planned(tmp_path, factors=factors, baseline={"stp": "none"}, seeds=[7])
    assert [run.plan.recipe.stp is None for run in runs] == [True, False]
    assert [run.plan.recipe.optimizer.warmup_iterations for run in runs] == [2, 5]
    assert runs[0].gate is None and runs[1].gate.first_live == 11


def test_a_recipe_may_lie_beside_the_matrix(tmp_path):
    (tmp_path / "mine.yaml").write_text((ROOT / "recipes" / "nam56r-tiny.yaml").read_text())
    _, runs = planned(tmp_path, recipe="./mine.yaml")
    assert runs[0].plan.recipe.name == "nam56r-tiny"


@pytest.mark.parametrize(
    ("changes", "where", "problem", "fix"),
    [
        ({"baseline": ..., "baselin": {}}, "line 24, column 1: baselin", "unknown key", "did you mean baseline?"),
        ({"zzz": 1}, "zzz", "unknown key", "known keys: schema_version, recipe, set"),
        ({"seeds": ...}, "seeds", "is missing", "add seeds"),
        ({"schema_version": 2}, "schema_version", "1", "docs"),
        ({"seeds": [1, "2"]}, "line 20, column 3: seeds.1", "is no seed (got '2')", "whole number"),
        ({"seeds": [0]}, "seeds.0", "is no seed", "from 1"),
        ({"seeds": []}, "seeds", "at least 1", "docs"),
        ({"seeds": [1, 2, 1]}, "seeds.2", "1 is there twice", "once"),
        ({"set": ["stp.weight"]}, "line 4, column 3: set.0", "is no setting", "path=value"),
        ({"set": [{"stp.weight": 1}]}, "set.0", "is no setting (got dict)", "quote"),
        ({"set": "stp.weight=1"}, "set", "is no setting (got 'stp.weight=1')", "path=value"),
        ({"set": ["stp.seed=3"]}, "set.0", "sets stp.seed", "seeds"),
        ({"set": ["stp.taps=[1"]}, "set.0", "stp.taps: line 1", ""),
        ({"factors": {}}, "factors", "at least 1", "docs"),
        ({"factors": {"a/b": SPANS}}, "factors.a/b", "is no name", "letters"),
        ({"factors": {"spans": {}}}, "factors.spans", "at least 1", "docs"),
        ({"factors": {"spans": {"1": "stp.n_spans=1"}}}, "factors.spans.1", "is no list of settings", "[]"),
        ({"factors": {"spans": {"1": ["x"]}}}, "factors.spans.1.0", "is no setting", "path=value"),
        ({"factors": {"spans": SPANS}}, "baseline", "must name one level of each factor", "spans"),
        ({"baseline": {"spans": "2", "gate": "early"}}, "baseline.spans", "2 is no level of spans", "1, 3"),
        ({"metric": "loss"}, "metric", "lm_loss", "docs"),
        ({"window": "late"}, "window", "'late' is no window of iterations", "FIRST:LAST"),
        ({"window": 3}, "window", "string", "docs"),
        (
            {"factors": {"spans": SPANS, "gate": {"a": ["stp.n_spans=5"]}}, "baseline": {"spans": "1", "gate": "a"}},
            "factors.gate",
            "sets stp.n_spans, and spans sets stp.n_spans",
            "one factor",
        ),
        (
            {"factors": {"spans": SPANS, "none": {"a": ["stp=null"]}}, "baseline": {"spans": "1", "none": "a"}},
            "factors.none",
            "sets stp, and spans sets stp.n_spans",
            "one factor",
        ),
        (
            {"factors": {"none": {"a": ["stp=null"]}, "spans": SPANS}, "baseline": {"spans": "1", "none": "a"}},
            "factors.spans",
            "sets stp.n_spans, and none sets stp",
            "one factor",
        ),
        ({"factors": {"spans": {"1": []}}, "baseline": {"spans": "1"}}, "factors", "nothing to compare", "level"),
        ({"seeds": list(range(1, 252))}, "factors", "make 1004 runs, more than 1000", "split"),
    ],
)
def test_a_mistake_is_refused_where_it_is(tmp_path, changes, where, problem, fix):
    with pytest.raises(UserError) as caught:
        read_matrix(write_matrix(tmp_path / "m.yaml", **changes))
    assert caught.value.field.startswith("m.yaml: line ") or where in ("seeds", "baseline")
    assert caught.value.field.endswith(where)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "a: !!set {b}", "a: &x 1\nb: *x", "\0"])
def test_what_is_no_matrix_at_all_is_refused(tmp_path, text):
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        read_matrix(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_matrix(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        ({"recipe": "nam56"}, "cell spans=1,gate=early: RECIPE", "unknown recipe"),
        ({"set": ["stp.wieght=1"]}, "cell spans=1,gate=early: --set stp.wieght", "no key 'wieght'"),
        (
            {"factors": {"spans": {"1": [], "3": ["stp.n_spans=0"]}}, "baseline": {"spans": "1"}},
            "cell spans=3: nam56r-tiny.yaml: stp.n_spans",
            "greater than 0",
        ),
        ({"set": ["launch.nodes=2", "parallel.pipeline=4", "parallel.stages=[3, 3, 3, 3]"]}, "launch.nodes", "node"),
        ({"factors": {"a": {"x": [], "y": ["stp.weight=0.02"]}}, "baseline": {"a": "x"}}, "factors", "plan the same"),
        (
            {"set": ["stp.weight=0"], "factors": {"spans": SPANS}, "baseline": {"spans": "1"}},
            "factors",
            "differ in STP alone, which acts in neither",
        ),
        ({"set": ["training.iterations=12"]}, "cell spans=1,gate=early: stp.start_step", "the run ends after 12"),
        (
            {
                "factors": {
                    "length": {
                        "short": ["training.iterations=15"],
                        "long": ["stp.start_step=20", "training.iterations=40"],
                    }
                },
                "baseline": {"length": "short"},
            },
            "cell length=long: stp.start_step",
            "opens at iteration 21, and the runs have 15 in common",
        ),
        ({"window": "1:10"}, "window", "wholly before the gate of spans=1,gate=early and spans=1,gate=late"),
        ({"window": "41:"}, "window", "begins after iteration 40"),
        (
            {"window": "21:31", "seeds": [1, 2]},
            "window",
            "2 seeds and 11 iterations, 21 to 31, to compare: no interval",
        ),
        (
            {"set": [*CONTENT["set"], "training.iterations=31"], "seeds": [1]},
            "seeds",
            "1 seed and 11 iterations, 21 to 31, to compare: no interval",
        ),
    ],
)
def test_a_matrix_that_could_come_to_nothing_is_refused_before_it_starts(tmp_path, changes, where, problem):
    with pytest.raises(UserError) as caught:
        planned(tmp_path, **changes)
    assert where in caught.value.field
    assert problem in caught.value.problem
    assert caught.value.fix or where.startswith("cell")


@pytest.mark.parametrize(
    "changes",
    [
        {"window": "21:32", "seeds": [1, 2]},
        {"window": "21:21"},
        {"set": [*CONTENT["set"], "training.iterations=32"], "seeds": [1]},
        # Cells that do not differ in STP are compared over all iterations.
        {
            "factors": {"rate": {"low": [], "high": ["optimizer.lr=4e-3"]}},
            "baseline": {"rate": "low"},
            "set": [*CONTENT["set"], "training.iterations=15"],
            "seeds": [1],
        },
    ],
)
def test_twelve_iterations_or_three_seeds_are_enough_to_begin(tmp_path, changes):
    planned(tmp_path, **changes)


def test_a_window_between_two_gates_is_one_for_those_that_differ_there(tmp_path):
    gates = {"gate": CONTENT["factors"]["gate"]}
    planned(tmp_path, factors=gates, baseline={"gate": "early"}, window="11:15")
    with pytest.raises(UserError, match="spans=3,gate=late"):
        base = {"spans": "1", "gate": "late"}
        planned(tmp_path, baseline=base, window=":20")


@pytest.mark.parametrize("name", ["stp-tiny", "stp-matrix"])
def test_the_shipped_matrices_can_be_planned(name):
    file = ROOT / "ablations" / f"{name}.yaml"
    for device in ("cpu", "cuda"):
        runs = plan_runs(read_matrix(file), file=file, device=device, directory=ROOT / "no-such-place")
        assert len(runs) == {"stp-tiny": 12, "stp-matrix": 72}[name]
        assert not any(run.plan.gaps for run in runs)


def test_a_dry_run_lists_the_runs_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_matrix(tmp_path / "m.yaml")

    def call(*more):
        arguments = ["ablate", str(file), "--device", "cpu", "--dry-run", "--run-dir", "new", *more]
        return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(["ablate"]), arguments, catch_exceptions=True)

    table, plain = call(), call("--format", "json")
    assert table.exit_code == plain.exit_code == 0, table.output
    assert "to run: 12 of 12" in table.stdout
    found = json.loads(plain.stdout)
    assert [run["step"] for run in found["runs"]] == ["begin"] * 12
    first = found["runs"][0]
    assert first["tokens"] == 40 * 8 * 256
    assert first["flops"] == first["tokens"] * 11_644_416  # what `memory nam56r-tiny` says of a token
    assert first["plan_digest"][:12] in table.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]
    refused = call("--resume")
    assert isinstance(refused.exception, UserError) and refused.exception.field == "--run-dir"


def test_a_file_is_read_once_and_not_without_end(tmp_path):
    """A pipe, as of a shell's <(...), has its text once; a device as /dev/zero has no end."""
    source = tmp_path / "m.yaml"
    write_matrix(source, zzz=1)
    text = source.read_text()
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    with pytest.raises(UserError, match="unknown key") as caught:
        read_matrix(Path(f"/dev/fd/{reading}"))
    os.close(reading)
    assert "line " in caught.value.field
    long = tmp_path / "long.yaml"
    long.write_text("# and so on\n" * 100_000)
    with pytest.raises(UserError, match="has more than 1,048,576 characters"):
        read_matrix(long)
