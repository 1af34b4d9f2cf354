"""The cost model by hand; `tests/parity` compares it with what Megatron builds, allocates and schedules."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from megacpp_stp.cli.memory import memory_command
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.flops import block_costs
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.memory import H200_BYTES
from megacpp_stp.plan.parameters import layer_weights, padded_vocab_size, parts
from megacpp_stp.recipe import load_recipe

# nam56r-tiny: h 128, 4 heads, latents 64, head 32 + 16, dense f 384, 4 experts of 192 (2 active) + shared 128.
MLA = 128 + 128 * 64 + 64 + 64 * 4 * 48 + 128 * 80 + 64 + 64 * 4 * 64 + 4 * 32 * 128
DENSE = 128 + 2 * 128 * 384
MOE = 128 + 128 * 4 + 4 * 2 * 128 * 192 + 2 * 128 * 128
IDLE_EXPERTS = 2 * 2 * 128 * 192
TABLE = 4096 * 128
GQA = "model.families.A={block: attention, head_dim: 48, kv_groups: 2}"


def cost_with(*overrides, device="cuda"):
    return cost_of(build_plan(load_recipe("nam56r-tiny", overrides), device=device))


def test_parameters_by_hand():
    cost = cost_with()
    assert cost.parameters.total == 3 * MLA + 5 * MOE + 4 * DENSE + 2 * TABLE + 128 == 2_783_744
    assert cost.parameters.total - cost.parameters.active == 5 * IDLE_EXPERTS
    found = {family: count.total for family, count in cost.parameters_by_family.items()}
    expected = {"A": 3 * MLA, "E": 5 * MOE, "M": 3 * DENSE, "R": DENSE, "embedding": TABLE, "output": TABLE + 128}
    assert found == expected
    assert list(found) == ["embedding", "A", "E", "M", "R", "output"]


def test_ranks_share_the_parameters_out():
    cost = cost_with()
    assert sum(cost.of_rank(rank).total for rank in range(2)) == cost.parameters.total
    assert cost.of_rank(0).total == 2 * MLA + 3 * MOE + DENSE + TABLE  # +E-E+E
    assert [memory.elements for memory in cost.ranks] == [cost.of_rank(rank).total for rank in range(2)]


def test_a_tied_head_is_a_copy_on_the_last_rank_only_when_it_has_no_embedding():
    cut, whole = "model.tie_embeddings=true", ("parallel.pipeline=1", "parallel.stages=[12]")
    tied = cost_with(cut)
    assert tied.parameters.total == cost_with().parameters.total - TABLE
    assert tied.ranks[1].elements == tied.of_rank(1).total + TABLE
    on_one = cost_with(cut, *whole, "launch.processes_per_node=1")
    assert on_one.ranks[0].elements == on_one.parameters.total
    assert tied.flops == cost_with().flops == on_one.flops


@pytest.mark.parametrize(("vocab_size", "tensor", "rows"), [(4096, 1, 4096), (4097, 1, 4224), (4097, 2, 4352)])
def test_vocabulary_is_padded(vocab_size, tensor, rows):
    recipe = load_recipe("nam56r-tiny", (f"model.vocab_size={vocab_size}", f"parallel.tensor={tensor}"))
    assert padded_vocab_size(recipe) == rows


def test_flops_by_hand():
    flops = cost_with().flops_by_family
    latents = MLA - 128 - 2 * 64  # all but the norms
    attention = 256 * 4 * (48 + 32)  # s n (d_qk + d_v): two products, 2 FLOPs, half the keys
    assert flops["A"].matrices == 3 * 2 * latents
    assert flops["A"].attention == 3 * attention
    assert flops["E"].forward == 5 * 2 * (MOE - IDLE_EXPERTS - 128)
    assert flops["output"].forward == 2 * TABLE
    assert flops["embedding"].forward == 0
    assert cost_with().flops.training == 3 * sum(found.forward for found in flops.values())
    assert cost_with(GQA).flops_by_family["A"].attention == 3 * 256 * 4 * (48 + 48)


def test_block_costs_are_those_of_the_layers_and_ignore_the_cut():
    recipe = load_recipe("nam56r-tiny", ("parallel.stages=[1]",))  # not a cut of 12 blocks
    costs = block_costs(recipe)
    assert costs == block_costs(load_recipe("nam56r-tiny"))
    assert len(costs) == 12
    assert sum(costs) == cost_with().flops.training
    assert costs[11] - costs[10] == 3 * 2 * TABLE  # the head, on the last block


def test_cuts_are_compared():
    cuts = cost_with().cuts
    assert cuts["recipe"].stages == cuts["equal"].stages == (6, 6)
    assert cuts["best"].stages == (8, 4)
    assert 1 <= cuts["best"].imbalance < cuts["equal"].imbalance


def rows_of(cost, rank=0):
    return {row.name: row for row in cost.ranks[rank].rows}


@pytest.mark.parametrize(("precision", "weight", "state"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_persistent_memory_by_hand(precision, weight, state):
    cost = cost_with(f"training.precision={precision}")
    elements, rows = cost.ranks[0].elements, rows_of(cost)
    assert rows["weights"].bytes == weight * elements
    assert rows["gradients"].bytes == 4 * elements
    assert rows["optimizer state"].bytes == state * elements
    assert all(rows[name].exact for name in ("weights", "gradients", "optimizer state"))
    assert not rows["activations"].exact


def test_the_distributed_optimizer_cuts_the_state_alone():
    four = ("launch.processes_per_node=4", "training.precision=bf16")
    whole, cut = (rows_of(cost_with(*four, f"optimizer.distributed={on}")) for on in ("false", "true"))
    assert cut["optimizer state"].bytes * 2 == whole["optimizer state"].bytes
    assert cut["gradients"].bytes == whole["gradients"].bytes
    assert not cut["optimizer state"].exact  # buckets are padded


def test_the_peak_is_of_the_passes_or_of_the_step():
    memory = cost_with().ranks[1]
    rows = {row.name: row.bytes for row in memory.rows}
    always = rows["weights"] + rows["gradients"] + rows["optimizer state"]
    assert memory.peak_bytes == always + rows["activations"] + rows["expert dispatch"] + rows["logits"]
    short = cost_with("training.sequence_length=8", "training.micro_batch_size=1").ranks[1]
    rows = {row.name: row.bytes for row in short.rows}
    assert short.peak_bytes == 4 * rows["weights"] + rows["optimizer step"]


def test_the_first_rank_holds_more_microbatches_and_only_the_last_has_logits():
    cost = cost_with()
    assert [memory.in_flight for memory in cost.ranks] == [(2,), (1,)]
    assert "logits" not in rows_of(cost)
    assert rows_of(cost, 1)["logits"].bytes == 2 * 256 * 4096 * 4
    assert rows_of(cost_with("training.precision=bf16"), 1)["logits"].bytes == 2 * 256 * 4096 * (4 + 2)


def test_whether_it_fits():
    assert cost_with().fits(0) is True
    assert cost_with(device="cpu").fits(0) is None
    huge = cost_with("model.hidden_size=65536", "model.ffn_hidden_size=262144")
    assert huge.ranks[0].peak_bytes > H200_BYTES
    assert huge.fits(0) is False


def test_an_unknown_symbol_is_an_error_of_ours():
    model = load_recipe("nam56r-tiny").model
    with pytest.raises(UserError, match="no parameter count"):
        layer_weights(model, "G")
    with pytest.raises(UserError, match="block: attention"):
        layer_weights(model, "*")


def test_no_part_is_lost_or_doubled_by_virtual_stages():
    overrides = ("parallel.virtual=2", "parallel.stages=[2,5,3,2]")
    recipe = load_recipe("nam56r-tiny", overrides)
    chosen = parts(recipe, lower(recipe))
    assert [part.layer for part in chosen if part.layer] == list(range(1, 13))
    assert (chosen[0].segment, chosen[-1].segment) == (0, 3)


def run_command(*arguments):
    app = typer.Typer()
    app.command()(memory_command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_json_alone_and_the_same_each_time():
    first, second = (run_command("nam56r-tiny", "--format", "json") for _ in range(2))
    assert first == second
    found = json.loads(first)
    assert found["cost_format"] == 1
    assert found["parameters"]["total"] == sum(part["parameters"] for part in found["parts"]) == 2_783_744
    assert found["flops_per_token"]["training"] == 3 * found["flops_per_token"]["forward"]
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {row["name"] for row in found["ranks"][1]["rows"]} >= {"weights", "gradients", "logits"}


def test_the_command_prints_every_number_of_the_table():
    text = run_command("nam56r-tiny", "--set", "training.precision=bf16")
    for piece in ("2,783,744", "2,292,224", "1,440,256", "1.2567", "8 4", "exact", "estimated", "131.3 GiB", "fits"):
        assert piece in text
    assert "not held against a capacity" in run_command("nam56r-tiny", "--device", "cpu")


def test_the_cost_model_needs_no_torch():
    code = "import sys, megacpp_stp.cli.memory, megacpp_stp.plan.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
