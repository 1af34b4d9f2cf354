"""`megacpp-stp runs compare` over seeds: which runs are one arm, how they are paired, what their interval is over."""

import math
from functools import partial

import pytest

from megacpp_stp.runs.files import read_json, write_json
from tests.unit.made_runs import GATE, answer, compare, loss_of, make_run, refused

WITHOUT = "stp=null"


def seeded(folder, seeds, *overrides, better=0.0, **facts):
    """One arm; how much better it is depends a little on the seed."""
    found = []
    for seed in seeds:
        name = f"{'stp' if better else 'base'}-{seed}"
        gain = better * (1 + 0.1 * seed)
        found.append(
            make_run(
                folder / name,
                f"training.seed={seed}",
                *overrides,
                loss=lambda i, seed=seed, gain=gain: loss_of(i, seed) - gain * (i > GATE),
                **facts,
            )
        )
    return found


def test_three_seeds_are_pooled_with_an_interval_over_seeds(tmp_path):
    base = seeded(tmp_path, [1, 2, 3], WITHOUT)
    other = seeded(tmp_path, [3, 1, 2], better=0.5)
    found = compare(base[0], *other, *base[1:])
    assert [(run["arm"], run["name"]) for run in found["runs"]] == [
        *(("A", f"base-{seed}") for seed in (1, 2, 3)),
        *(("B", f"stp-{seed}") for seed in (1, 2, 3)),
    ]
    (result,) = found["pairs"]
    assert result["seeds"] == [1, 2, 3]
    assert result["by_seed"] == pytest.approx([-0.55, -0.60, -0.65])
    assert result["difference"] == pytest.approx(-0.6)
    half = 4.30265 * 0.05 / math.sqrt(3)
    assert (result["interval"]["low"], result["interval"]["high"]) == pytest.approx(
        (-0.6 - half, -0.6 + half), abs=1e-6
    )
    assert result["method"] == "Student's t over 3 seeds"
    assert result["controlled"]
    assert not any("says nothing of other seeds" in note for note in found["notes"])
    assert "by seed: 1: -0.55, 2: -0.6, 3: -0.65" in answer("compare", *base, *other)


@pytest.mark.parametrize("number", [1, 2])
def test_one_seed_that_ran_elsewhere_or_changed_spoils_its_arm(tmp_path, number):
    base, other = seeded(tmp_path, [1, 2, 3], WITHOUT), seeded(tmp_path, [1, 2, 3], better=0.5)
    receipt = read_json(other[number] / "receipt.json")
    attempts = [receipt["attempts"][0], {**receipt["attempts"][0], "from_iteration": 20, "plan_digest": "x"}]
    write_json(other[number] / "receipt.json", {**receipt, "attempts": attempts})
    found = compare(*base, *other)
    assert found["title"].startswith("NOT CONTROLLED")
    assert f"{other[number].name} went on with another plan" in found["pairs"][0]["standing"]
    (other[number] / "attempt-1").mkdir()
    elsewhere = {**receipt, "substrate": {"hardware": {"device": "cuda"}}}
    write_json(other[number] / "attempt-1" / "receipt.json", elsewhere)
    assert f"{other[number].name} changed it on the way" in refused("compare", *base, *other).problem


def test_one_seed_without_its_plan_is_an_arm_of_its_own(tmp_path):
    """What is not known to be equal is not pooled, and not controlled."""
    base, other = seeded(tmp_path, (1, 2), WITHOUT), seeded(tmp_path, (1, 2), better=0.2)
    (other[1] / "plan.json").unlink()
    found = compare(*base, *other)
    assert found["title"].startswith("NOT CONTROLLED")
    assert [(pair["seeds"], pair["controlled"]) for pair in found["pairs"]] == [([1], True), ([2], False)]


def test_partners_are_found_by_the_seed_that_ran(tmp_path):
    """A plan is held by its digest; a receipt that repeats another seed was edited, and pairs with nothing."""
    for seed in (1, 2):
        loss = partial(loss_of, seed=seed)
        make_run(tmp_path / f"a{seed}", WITHOUT, f"training.seed={seed}", loss=loss)
        run = make_run(tmp_path / f"b{seed}", f"training.seed={seed}", loss=loss)
    four = [tmp_path / name for name in ("a1", "a2", "b1", "b2")]
    (pair,) = compare(*four)["pairs"]
    assert (pair["seeds"], pair["by_seed"]) == ([1, 2], [0.0, 0.0])
    receipt = read_json(run / "receipt.json")
    write_json(run / "receipt.json", {**receipt, "seeds": {"training": 1, "stp": 1}})
    assert "says training.seed 1, and its plan 2" in refused("compare", *four).problem


def test_two_seeds_are_averaged_and_the_rest_is_said(tmp_path):
    base, other = seeded(tmp_path, [1, 2, 4], WITHOUT), seeded(tmp_path, [1, 2], better=0.5)
    found = compare(*base, *other)
    (result,) = found["pairs"]
    assert result["method"].endswith("over 30 iterations of the mean of 2 seeds")
    assert result["difference"] == pytest.approx(-0.575)
    assert "base-4 (seed 4) has no partner of its seed: left out" in found["notes"]
    assert "base-4" not in [run["name"] for run in found["runs"]]
    assert any("says nothing of other seeds" in note for note in found["notes"])


def test_every_seed_counts_the_same_iterations(tmp_path):
    base = seeded(tmp_path, [1, 2], WITHOUT)
    other = [
        seeded(tmp_path, [1], better=0.5)[0],
        seeded(tmp_path, [2], better=0.5, iterations=30, complete=False)[0],
    ]
    assert compare(*base, *other)["window"]["last"] == 30


def test_seeds_in_twos(tmp_path):
    """Two single runs are partners whatever their seeds; arms without a common seed are not compared."""
    one, two = seeded(tmp_path, [1], WITHOUT)[0], seeded(tmp_path, [2], better=0.5)[0]
    found = compare(one, two)
    assert found["title"].startswith("NOT CONTROLLED")
    assert found["pairs"][0]["standing"] == "not controlled: training.seed differs too"
    assert any("other batches" in note for note in found["notes"])
    three = seeded(tmp_path, [3], better=0.5)[0]
    problem = refused("compare", one, two, three).problem
    assert "no seed in common; they are two arms because " in problem and "stp." in problem


def test_seeds_alone_show_what_a_seed_makes(tmp_path):
    found = compare(*seeded(tmp_path, [1, 2, 3]))
    assert [pair["b"] for pair in found["pairs"]] == ["B", "C"]
    assert found["window"]["first"] == 1
    assert all("this is what a seed makes" in pair["standing"] for pair in found["pairs"])
    assert found["title"].startswith("NOT CONTROLLED")
    twin = make_run(tmp_path / "twin", "training.seed=1")
    same = compare(tmp_path / "base-1", twin)["pairs"][0]
    assert same["standing"].startswith("controlled: the plans are equal")
    other = make_run(tmp_path / "other", WITHOUT)
    assert "same seed 1" in refused("compare", other, tmp_path / "base-1", twin).problem
