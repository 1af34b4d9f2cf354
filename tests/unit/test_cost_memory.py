"""Memory of a GPU by hand, row by row; `tests/parity/test_memory_estimate.py` holds it to autograd."""

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.activations import kept_by
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.footprint import footprints
from megacpp_stp.plan.layers import layer_weights
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.memory import H200_BYTES
from megacpp_stp.plan.parameters import parts
from megacpp_stp.recipe import load_recipe
from tests.recipes import STAND_INS
from tests.unit.test_cost import PREDICTION, SPARSE, cost_with


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
        "state_dim: 16, groups: 2, chunk_size: 16, complex_rotation: false, mimo_rank: 1, kernel: torch}",
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


def test_fp8_weights_are_there_twice_more_and_only_of_the_named_families():
    settings = ("training.fp8={format: hybrid, scaling: tensorwise, amax_history: null, families: [M]}",)
    plain, fp8 = (cost_of(build_plan(load_recipe("nam56r", more), device="cuda")) for more in ((), settings))
    products = sum(
        weight.count for part in plain.parts if part.family == "M" for weight in part.weights if weight.is_matrix
    )
    assert rows_of(fp8)["weights"].bytes - rows_of(plain)["weights"].bytes == 2 * products
