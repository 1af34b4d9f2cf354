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
from megacpp_stp.plan.activations import kept_by
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.flops import block_costs
from megacpp_stp.plan.footprint import footprints
from megacpp_stp.plan.layers import layer_weights
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.memory import H200_BYTES
from megacpp_stp.plan.parameters import padded_vocab_size, parts
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
M2RNN = "model.families.R={block: m2rnn, heads: 44, key_dim: 64, value_dim: 16, conv_kernel: 4, checkpoint_every: 64}"
MAMBA2 = "model.families.M={block: mamba2, heads: 112, head_dim: 64, state_dim: 64, groups: 8}"
MAMBA3 = (
    "model.families.M={block: mamba3, heads: 112, head_dim: 64, state_dim: 64, groups: 8, chunk_size: 64, "
    "complex_rotation: false}"
)
SPARSE = "model.families.A.sparse={ranks: [0, 2], indexer_heads: 2, indexer_head_dim: 24, topk: 64, loss_coeff: 0.01}"
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


def held(*overrides, rank=0):
    return {name: row.bytes for name, row in rows_of(cost_with("training.precision=bf16", *overrides), rank).items()}


def test_what_tensor_parallelism_divides():
    """Of an MLA layer the norms are cut under sequence parallelism, heads are cut always."""
    recipe = load_recipe(STAND_INS, ("training.precision=bf16",))
    part = next(part for part in parts(recipe, lower(recipe, stages=(6, 6))) if part.kind == "mla")
    norms = (2 * 4 + 2) * (128 + 64 + 64) + 3 * 4
    heads = 4 * (2 * 48 + 2 * 32) * 2 + 4 * 4
    kept = kept_by(recipe, part).layer
    assert (kept.sequence, kept.tensor, kept.whole) == (norms, heads, 0)
    for sequence, expected in (("false", norms + heads // 2), ("true", (norms + heads) // 2)):
        cut = load_recipe(STAND_INS, ("parallel.tensor=2", f"parallel.sequence_parallel={sequence}"))
        assert kept.on_gpu(cut.parallel) == expected
    # A routed copy is whole on each of them, an expert's hidden width is not.
    expert = next(part for part in parts(recipe, lower(recipe, stages=(6, 6))) if part.kind == "moe")
    moe = kept_by(recipe, expert)
    assert (moe.dispatch.sequence, moe.dispatch.tensor) == (0, 0)
    assert moe.layer.tensor == 2 * 3 * 192 * 2 + 2 * 128 * 2


def test_context_parallelism_cuts_the_tokens_and_not_the_keys():
    one, two = ("launch.processes_per_node=4", "parallel.context=1"), ("launch.processes_per_node=4",)
    whole = footprints_of(SPARSE, *one)["dsa"]
    cut = footprints_of(SPARSE, *two, "parallel.context=2")["dsa"]
    assert cut.scores * 2 == whole.scores
    assert cut.activations > whole.activations / 2


def footprints_of(*overrides):
    recipe = load_recipe(STAND_INS, overrides)
    chosen = parts(recipe, lower(recipe, stages=recipe.parallel.stages))
    return {part.kind: found for part, found in zip(chosen, footprints(recipe, chosen), strict=True)}


def test_scores_of_sparse_attention_have_their_row():
    rows = held(SPARSE)
    each = 256 * (4 + 4 + 2 + 3) + 17  # of a head, for each token of 256: two fp32, one bf16, three masks; five rows
    assert rows["DSA scores"] == 2 * (2 * 256) * 4 * each
    again = held(SPARSE, "training.recompute={granularity: selective, modules: [core_attn]}")
    assert again["DSA scores"] == 1 * (2 * 256) * 4 * each  # of one layer of one microbatch
    assert again["activations"] < rows["activations"]
    assert again["recomputed"] > 0
    assert "recomputed" not in rows


def passing_rows(*overrides):
    rows = held(*overrides)
    return rows["DSA scores"], rows["DSA pass"], rows.get("indexer loss", 0)


def test_the_pass_of_one_sparse_layer_and_its_indexers_loss_have_rows():
    tokens, kept = 2 * 256, 256 * 13 + 17
    beside = tokens * 4 * (30 * 256 - kept)
    assert passing_rows(SPARSE)[1:] == (beside, 0)
    for module in ("core_attn", "mla_up_proj"):
        once = f"training.recompute={{granularity: selective, modules: [{module}]}}"
        assert passing_rows(SPARSE, once)[1:] == (beside, 0)
    assert passing_rows(SPARSE, "training.recompute={granularity: full, modules: []}")[:2] == (
        tokens * 4 * kept,
        beside,
    )
    # 64 heads of the indexer against 4 of the attention: the highest of three peaks of its own.
    many = SPARSE.replace("indexer_heads: 2", "indexer_heads: 64")
    assert passing_rows(many)[1:] == (beside, tokens * 256 * (64 * 13 - 4 * 30))
    assert passing_rows(many.replace("0.01", "0"))[1:] == (beside, tokens * 256 * (64 * 8 - 4 * 30))
    found = footprints_of(many, "training.precision=bf16")["dsa"]
    assert found.again == found.attention_pass + found.indexer_loss  # of which a cut's search takes the largest
    assert "DSA pass" not in held()


def test_tensor_parallelism_divides_the_heads_of_a_pass_and_not_the_indexers():
    many = SPARSE.replace("indexer_heads: 2", "indexer_heads: 64")
    two = ("launch.processes_per_node=4", "parallel.tensor=2", "parallel.sequence_parallel=true")
    one, cut = footprints_of(many)["dsa"], footprints_of(many, *two)["dsa"]
    assert cut.attention_pass * 2 == one.attention_pass
    tokens = 2 * 256
    assert cut.indexer_loss - one.indexer_loss == tokens * 256 * 2 * 30
    short = footprints_of(many, "launch.processes_per_node=4", "parallel.context=2")["dsa"]
    assert (short.attention_pass * 2, short.indexer_loss * 2) == (one.attention_pass, one.indexer_loss)


MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


@pytest.mark.parametrize("module", MODULES)
def test_each_module_that_is_computed_again_keeps_less(module):
    # Transformer Engine's, since norms are recomputed only there.
    backend = "model.backend=te"
    whole, less = held(backend), held(backend, f"training.recompute={{granularity: selective, modules: [{module}]}}")
    kept = ("activations", "expert dispatch")
    assert sum(less.get(name, 0) for name in kept) < sum(whole[name] for name in kept)
    assert less["recomputed"] < whole["activations"]


def test_moe_act_keeps_the_first_product_of_an_expert():
    te = ("model.backend=te", "model.families.E.grouped_gemm=true")
    again = "training.recompute={granularity: selective, modules: [moe_act]}"
    # Of two experts a token, on three expert layers for two microbatches: two of three widths are gone.
    gone = 2 * 2 * 192 * 2 * (2 * 256) * 3 * 2
    assert held(*te)["activations"] - held(*te, again)["activations"] == gone


def test_full_recomputation_keeps_a_layers_input():
    rows = held("training.recompute={granularity: full, modules: []}")
    tokens, microbatches = 2 * 256, 2
    assert rows["activations"] == microbatches * tokens * (6 * 128 * 2 + 8)
    assert "expert dispatch" not in rows
    assert held("training.recompute={granularity: full, modules: []}", rank=1)["logits"] == held(rank=1)["logits"]


def test_each_head_keeps_its_softmax():
    one, three = held(rank=1)["logits"], held(PREDICTION, rank=1)["logits"]
    assert three - one == 2 * 256 * 4096 * 2 * 4


def test_what_stays_fp32_in_a_bf16_model_has_no_copy():
    found = footprints_of(
        "training.precision=bf16",
        "model.families.M={block: mamba3, heads: 4, head_dim: 64, "
        "state_dim: 16, groups: 2, chunk_size: 16, complex_rotation: false}",
    )["mamba3"]
    fp32 = 2 * 4 * 16 + 2 * 4
    assert found.weights == 2 * found.elements + 2 * fp32
    assert found.state == 12 * found.elements - 4 * fp32


def test_whether_it_fits():
    assert cost_with().fits(0) is True
    assert cost_with(device="cpu").fits(0) is None
    huge = cost_with("model.hidden_size=65536", "model.ffn_hidden_size=262144")
    assert huge.ranks[0].peak_bytes > H200_BYTES
    assert huge.fits(0) is False
    assert huge.left_bytes(0) == H200_BYTES - huge.ranks[0].peak_bytes < 0
    assert cost_with(device="cpu").left_bytes(0) is None


def test_an_unknown_kind_is_an_error_of_ours():
    model = load_recipe(STAND_INS).model
    with pytest.raises(UserError, match="no parameter count"):
        layer_weights(model, "gdn")
    for kind in ("attention", "mamba2", "mamba3", "m2rnn"):
        with pytest.raises(UserError, match=f"block: {kind}"):
            layer_weights(model, kind)
    with pytest.raises(UserError, match="indexer"):
        layer_weights(model, "dsa")


def test_no_part_is_lost_or_doubled_by_virtual_stages():
    overrides = ("parallel.virtual=2", "parallel.stages=[2,5,3,2]")
    recipe = load_recipe(STAND_INS, overrides)
    chosen = parts(recipe, lower(recipe, stages=recipe.parallel.stages))
    assert [part.layer for part in chosen if part.layer] == list(range(1, 13))
    assert (chosen[0].segment, chosen[-1].segment) == (0, 3)


def run_command(*arguments):
    app = typer.Typer()
    app.command()(memory_command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


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


def test_the_cost_model_needs_no_torch():
    code = "import sys, megacpp_stp.cli.memory, megacpp_stp.plan.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
