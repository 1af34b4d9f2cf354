"""``megacpp-stp memory``: what it prints for people and for machines."""

import json

from megacpp_stp.plan.memory import H200_BYTES
from tests.recipes import STAND_INS
from tests.unit.test_cost import SPARSE, run_command


def test_the_command_prints_json_alone_and_the_same_each_time():
    first, second = (run_command(STAND_INS, "--format", "json") for _ in range(2))
    assert first == second
    found = json.loads(first)
    assert found["cost_format"] == 1
    assert found["parameters"]["total"] == sum(part["parameters"] for part in found["parts"]) == 2_783_744
    assert found["flops_per_token"]["training"] == 3 * found["flops_per_token"]["forward"]
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {row["name"] for row in found["ranks"][1]["rows"]} >= {"weights", "gradients", "logits"}


def test_the_command_prints_every_number_of_the_table():
    text = run_command(STAND_INS, "--set", "training.precision=bf16")
    for piece in ("2,783,744", "2,292,224", "1,440,256", "1.2567", "8 4", "exact", "estimated", "131.3 GiB", "fits"):
        assert piece in text
    assert "not held against a capacity" in run_command(STAND_INS, "--device", "cpu")


def test_the_command_says_what_is_left_and_what_the_peak_sums():
    text = run_command(STAND_INS, "--set", "model.hidden_size=8192", "--set", SPARSE)
    left = json.loads(run_command(STAND_INS, "--set", "model.hidden_size=8192", "--set", SPARSE, "--format", "json"))
    worst = max(left["ranks"], key=lambda rank: rank["peak_bytes"])
    assert worst["left_bytes"] == H200_BYTES - worst["peak_bytes"]
    assert (
        f"fits: at most {worst['peak_bytes'] / 2**30:.1f} GiB (pipeline rank {worst['rank']}) of 131.3 GiB; "
        f"{worst['left_bytes'] / 2**30:.1f} GiB left for what is not modelled"
    ) in text
    peak = next(line for line in text.splitlines() if line.startswith("  peak "))
    assert peak.endswith(
        "weights, gradients, optimizer state; and the larger of (optimizer step) and "
        "(activations, expert dispatch, DSA scores, DSA pass, logits), which never meet"
    )


def test_the_command_names_the_largest_row_where_it_does_not_fit():
    sizes = ("--set", "training.sequence_length=65536", "--set", "training.precision=bf16", "--set", SPARSE)
    text = run_command(STAND_INS, *sizes)
    assert "does not fit" in text
    assert "GiB too much" in text
    assert "the largest row of pipeline rank 0 is DSA scores" in text
    found = json.loads(run_command(STAND_INS, *sizes, "--format", "json"))
    assert (found["ranks"][0]["fits"], found["ranks"][0]["largest_row"]) == (False, "DSA scores")
