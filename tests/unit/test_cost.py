"""The cost model by hand; `tests/parity` compares it with what Megatron builds, allocates and schedules."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from megacpp_stp.cli.memory import memory_command
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.flops import block_costs
from megacpp_stp.plan.layers import layer_weights
from megacpp_stp.plan.mixers import mamba3_weights
from megacpp_stp.plan.parameters import padded_vocab_size
from megacpp_stp.recipe import load_recipe
from tests.recipes import STAND_INS

# stand-ins.yaml: h 128, 4 heads, latents 64, head 32 + 16, dense f 384, 4 experts of 192 (2 active) + shared 128.
MLA = 128 + 128 * 64 + 64 + 64 * 4 * 48 + 128 * 80 + 64 + 64 * 4 * 64 + 4 * 32 * 128
DENSE = 128 + 2 * 128 * 384
MOE = 128 + 128 * 4 + 4 * 2 * 128 * 192 + 2 * 128 * 128
IDLE_EXPERTS = 2 * 2 * 128 * 192
TABLE = 4096 * 128
GQA = "model.families.A={block: attention, head_dim: 48, kv_groups: 2, dense_mlp: false}"


def cost_with(*overrides, device="cuda"):
    return cost_of(build_plan(load_recipe(STAND_INS, overrides), device=device))


def run_command(*arguments):
    app = typer.Typer()
    app.command()(memory_command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


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
    recipe = load_recipe(STAND_INS, (f"model.vocab_size={vocab_size}", f"parallel.tensor={tensor}"))
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
    recipe = load_recipe(STAND_INS, ("parallel.stages=[1]",))  # not a cut of 12 blocks
    costs = block_costs(recipe)
    assert costs == block_costs(load_recipe(STAND_INS))
    assert len(costs) == 12
    assert sum(costs) == cost_with().flops.training
    assert costs[11] - costs[10] == 3 * 2 * TABLE  # the head, on the last block


def test_cuts_are_compared():
    cuts = cost_with().cuts
    assert cuts["recipe"].stages == cuts["equal"].stages == (6, 6)
    assert cuts["best"].stages == (8, 4)
    assert 1 <= cuts["best"].imbalance < cuts["equal"].imbalance
    assert all(cut.runs for cut in cuts.values())


# The sizes that the mixers' authors publish their counts for.
AT_3584 = ("model.hidden_size=3584", "model.heads=56")
M2RNN = (
    "model.families.R={block: m2rnn, heads: 44, key_dim: 64, value_dim: 16, conv_kernel: 4, checkpoint_every: 64, "
    "kernel: torch}"
)
MAMBA2 = "model.families.M={block: mamba2, heads: 112, head_dim: 64, state_dim: 64, groups: 8}"
MAMBA3 = (
    "model.families.M={block: mamba3, heads: 112, head_dim: 64, state_dim: 64, groups: 8, chunk_size: 64, "
    "complex_rotation: false, mimo_rank: 1, kernel: torch}"
)
SPARSE = (
    "model.families.A.sparse={ranks: [0, 2], indexer_heads: 2, indexer_head_dim: 24, topk: 64, "
    "kernel: upstream, loss: dense, loss_coeff: 0.01}"
)
PREDICTION = "model.mtp={depths: 2, pattern: AE, loss_coeff: 0.3}"


# A loss of the indexer needs sparse attention on each rank; blocks 1 and 5 have it.
UNEQUAL = (SPARSE.replace("[0, 2]", "[0, 1]"), "parallel.stages=[4,8]")


def test_equal_counts_that_could_not_run_are_shown_as_such():
    cuts = cost_with(*UNEQUAL).cuts
    assert {name: cut.runs for name, cut in cuts.items()} == {"recipe": True, "best": True, "equal": False}
    flags = [token for override in UNEQUAL for token in ("--set", override)]
    rows = [line for line in run_command(STAND_INS, *flags).splitlines() if line.startswith("equal blocks")]
    assert len(rows) == 1
    assert "6 6" in rows[0]
    assert rows[0].endswith("would not run: a pipeline rank lacks a kind of block that it needs")
    assert "would not run" not in run_command(STAND_INS)
    assert json.loads(run_command(STAND_INS, *flags, "--format", "json"))["cuts"]["equal"]["runs"] is False


def layer_of(kind, *overrides):
    """Weights of one layer, and FLOPs a token of all layers of its family."""
    model = load_recipe(STAND_INS, overrides).model
    return {weight.name: weight for weight in layer_weights(model, kind)}


def test_recurrent_layers_by_hand():
    count = sum(weight.count for weight in layer_of("m2rnn", *AT_3584, M2RNN).values())
    assert count == 8_202_776 + 3584
    inner, state = 112 * 64, 8 * 64
    found = layer_of("mamba3", *AT_3584, MAMBA3)
    assert found["mixer.in_proj"].count == 15_696 * 3584
    assert found["mixer.out_proj"].count == 3584 * 7168
    assert {name for name, weight in found.items() if weight.keeps_fp32} == {
        "mixer.B_bias",
        "mixer.C_bias",
        "mixer.dt_bias",
        "mixer.D",
    }
    rotated = layer_of("mamba3", *AT_3584, MAMBA3.replace("false", "true"))
    assert rotated["mixer.angle_proj"].count == 16 * 3584
    assert rotated["mixer.angle_proj"].split == "none"
    # mamba_mixer.py: in_proj z x B C dt; a convolution of 4 steps with bias; dt_bias, A_log, D; a gated norm; out_proj.
    projections = 3584 * (2 * inner + 2 * state + 112) + 3584 * inner
    small = (inner + 2 * state) * (4 + 1) + 3 * 112 + inner
    mamba2 = layer_of("mamba2", *AT_3584, MAMBA2)
    assert sum(weight.count for weight in mamba2.values()) == 3584 + projections + small
    assert not any(weight.keeps_fp32 for weight in mamba2.values())


def test_recurrent_flops_by_hand():
    flops = cost_with(*AT_3584, MAMBA3, M2RNN).flops_by_family
    assert flops["R"].matrices == 2 * (5_662_720 + 2_523_136)
    assert flops["R"].recurrence == 2 * 44 * 64 * 16 * (16 + 2) + 2 * 4 * (2 * 64 + 44 * 16)
    assert flops["M"].matrices == 3 * 2 * (15_696 * 3584 + 3584 * 7168)
    assert flops["M"].recurrence == 3 * 112 * (2 * 64 * (64 + 64) + 4 * 64 * 64)
    assert flops["M"].forward == flops["M"].matrices + flops["M"].recurrence
    several = cost_with(*AT_3584, MAMBA3.replace("mimo_rank: 1", "mimo_rank: 4"), M2RNN).flops_by_family["M"]
    assert several.matrices - flops["M"].matrices == 3 * 2 * 3 * (2 * 8 * 64) * 3584
    assert several.recurrence == 3 * 112 * (16 * 2 * 64 * (64 + 64) + 4 * 4 * 64 * 64)
    # Upstream's figure for the scan.
    assert cost_with(*AT_3584, MAMBA2, "model.backend=te").flops_by_family["M"].recurrence == 3 * 7 * 112 * 64 * 64


def test_sparse_attention_by_hand():
    found, plain = layer_of("dsa", SPARSE), layer_of("mla")
    indexer = 64 * 2 * 24 + 128 * 24 + 2 * 24 + 128 * 2
    assert sum(weight.count for weight in found.values()) == sum(weight.count for weight in plain.values()) + indexer
    assert all(weight.split == "none" for name, weight in found.items() if "indexer" in name)
    sparse, dense = cost_with(SPARSE).flops_by_family["A"], cost_with().flops_by_family["A"]
    assert sparse.matrices - dense.matrices == 2 * 2 * (indexer - 2 * 24)
    # 256 positions: the first 64 attend to all before them, the others to 64; keys are 64 + 16 wide, values 64.
    keys = (64 * 64 / 2 + 192 * 64) / 256
    absorbed = 2 * 4 * (80 + 64) * keys + 2 * 2 * 24 * 128
    assert sparse.attention - dense.attention == 2 * (absorbed - 256 * 4 * (48 + 32))
    # With as many keys as positions nothing is left out.
    widest = cost_with(SPARSE.replace("topk: 64", "topk: 999")).flops_by_family["A"]
    assert widest.attention - dense.attention == 2 * (4 * 144 * 256 + 2 * 24 * 256 - 256 * 4 * 80)
    # Where the mean number of keys is no whole one, 55.808 of 250 positions, only the product is rounded.
    odd, dense = (cost_with("training.sequence_length=250", *more).flops_by_family["A"] for more in ((SPARSE,), ()))
    assert odd.attention - dense.attention == 2 * (int(2 * 4 * 144 * 55.808) + 2 * 24 * 250 - 250 * 4 * 80)


def test_prediction_is_a_family_of_its_own_on_the_last_stage():
    cost, plain = cost_with(PREDICTION), cost_with()
    depth = 3 * 128 + 2 * 128 * 128 + MLA + MOE
    assert cost.parameters_by_family["mtp"].total == 2 * depth
    assert cost.parameters_by_family["mtp"].active == 2 * (depth - IDLE_EXPERTS)
    assert cost.parameters.total == plain.parameters.total + 2 * depth
    assert {part.segment for part in cost.parts if part.family == "mtp"} == {1}
    # The copy of the embedding is held there, and is no parameter of the model's.
    assert cost.ranks[1].elements == plain.ranks[1].elements + 2 * depth + TABLE
    assert cost.ranks[0].elements == plain.ranks[0].elements
    flops = cost.flops_by_family["mtp"]
    blocks = plain.flops_by_family
    assert flops.forward == 2 * (2 * 2 * 128 * 128 + 2 * TABLE + blocks["A"].forward // 3 + blocks["E"].forward // 5)
    both = zip(block_costs(cost.plan.recipe), block_costs(plain.plan.recipe), strict=True)
    on_last_block = [new - old for new, old in both]
    assert on_last_block == [0] * 11 + [flops.training]
    on_one = cost_with(PREDICTION, "parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")
    assert on_one.ranks[0].elements == on_one.parameters.total


def test_dense_layers_of_attention_blocks_count_as_attention():
    cost = cost_with("model.families.A.dense_mlp=true")
    assert cost.parameters_by_family["A"].total == 3 * (MLA + DENSE)
    assert cost.parameters_by_family["M"].total == 3 * DENSE


def test_transformer_engine_keeps_down_projections_whole_on_each_rank():
    torch, fused = (layer_of("mla", f"model.backend={name}") for name in ("torch", "te"))
    differ = {name for name, weight in torch.items() if weight.split != fused[name].split}
    assert differ == {"self_attention.linear_q_down_proj", "self_attention.linear_kv_down_proj"}


def test_the_cost_model_needs_no_torch():
    code = "import sys, megacpp_stp.cli.memory, megacpp_stp.plan.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("rank", "more"), [(1, set()), (2, {"mimo_x", "mimo_z", "mimo_o"})])
def test_what_of_mamba3_is_counted_as_fp32_in_a_bf16_model(rank, more):
    """As `Mamba3Mixer.fp32_parameters`."""
    model = load_recipe("nam56r-tiny", (f"model.families.M.mimo_rank={rank}",)).model
    found = {weight.name.removeprefix("mixer.") for weight in mamba3_weights(model) if weight.keeps_fp32}
    assert found == {"dt_bias", "B_bias", "C_bias", "D"} | more
