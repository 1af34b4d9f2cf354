"""Where ranks are and what they send: Megatron's own groups, and sums that a pencil gives."""

import io

import pytest
from rich.console import Console

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.placement import place
from megacpp_stp.plan.render import print_plan
from megacpp_stp.plan.render_world import amount, warnings
from megacpp_stp.plan.traffic import flows, hidden_bytes
from megacpp_stp.recipe import load_recipe

MANY = ("launch.nodes=64", "training.global_batch_size=4096")


def recipe_of(name="nam56r", *overrides):
    return load_recipe(name, overrides)


def sizes(tensor=1, pipeline=1, context=1, expert=1, nodes=2, per_node=8):
    """A recipe with these sizes; that nothing else would launch it does not matter here."""
    recipe = load_recipe("nam56r", ("training.global_batch_size=4096",))
    parallel = recipe.parallel.model_copy(
        update={"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
    )
    launch = recipe.launch.model_copy(update={"nodes": nodes, "processes_per_node": per_node})
    return recipe.model_copy(update={"parallel": parallel, "launch": launch})


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2, "expert": 4},
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"tensor": 2, "context": 2, "pipeline": 2, "nodes": 4},
        {"expert": 8, "pipeline": 4, "nodes": 64},
        {"tensor": 4, "context": 2, "expert": 8, "pipeline": 2, "nodes": 8},
    ],
    ids=str,
)
def test_ranks_are_in_the_groups_that_megatron_puts_them_in(layout):
    """Built as ``initialize_model_parallel`` does, from its generator and its default order."""
    import inspect

    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    recipe = sizes(**layout)
    parallel, placement = recipe.parallel, place(recipe)
    world = recipe.launch.nodes * recipe.launch.processes_per_node
    tensor, pipeline, context, expert = parallel.tensor, parallel.pipeline, parallel.context, parallel.expert
    data = world // (tensor * pipeline * context)
    dense = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order=order)
    others = world // (tensor * expert * pipeline)
    experts = RankGenerator(tp=tensor, ep=expert, dp=others, pp=pipeline, cp=1, order=order)
    wanted = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp-cp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "tensor and expert": experts.get_ranks("tp-ep"),
        "expert data": experts.get_ranks("dp"),
    }
    for axis, groups in wanted.items():
        assert sorted(placement.groups(axis)) == sorted(groups), axis
        assert placement.size(axis) == len(groups[0]), axis


def test_groups_that_belong_inside_a_node_are_warned_of_where_they_do_not_fit():
    inside = place(sizes(tensor=2, expert=4, nodes=64))
    assert (inside.most_nodes("tensor"), inside.most_nodes("expert")) == (1, 1)
    assert inside.most_nodes("data") == 64
    assert list(warnings(inside)) == []
    (warning,) = warnings(place(sizes(tensor=2, expert=8)))
    assert "expert parallelism" in warning and "groups of 8 reach over 2 nodes of 8" in warning
    assert len(list(warnings(place(sizes(tensor=4, expert=4, per_node=2, nodes=8))))) == 2


def found(recipe):
    plan = build_plan(recipe)
    return {(flow.axis, flow.operation, flow.what): flow for flow in flows(plan)}


def test_the_bytes_of_experts_and_gradients():
    """nam56r on two nodes: PP1 EP8, 256 sequences of 4096 tokens on 16 GPUs, 22 expert layers, top 4, bf16."""
    recipe = recipe_of("nam56r", "launch.nodes=2")
    everything = found(recipe)
    tokens = everything["expert", "all-to-all", "tokens to their experts and back"]
    micro_batches = 256 // (16 * 2)
    hidden = 2 * 4096 * 3584 * 2
    assert hidden_bytes(recipe) == hidden
    # There and back, forward and backward.
    assert tokens.payload == 4 * 22 * micro_batches * 4 * hidden
    assert tokens.sent == tokens.payload * 7 // 8
    assert (tokens.size, tokens.over_network) == (8, 0)
    gradients = everything["data", "reduce-scatter", "gradients"]
    weights = everything["data", "all-gather", "weights"]
    assert gradients.sent == gradients.payload * 15 // 16
    assert gradients.over_network == gradients.sent  # one ring over both nodes
    assert 2 * weights.payload > gradients.payload > weights.payload  # fp32; bf16, but for what stays fp32
    experts = everything["expert data", "reduce-scatter", "gradients of experts"]
    assert experts.payload == 4 * 22 * 2 * 2 * 3584 * 896  # two of 16 experts, two matrices each
    assert (experts.size, experts.over_network) == (2, 8 * experts.sent)  # eight groups cross


def test_without_the_distributed_optimizer_gradients_are_reduced_whole():
    keys = ("optimizer.distributed=false", "optimizer.overlap_param_gather=false", "training.checkpoint=null")
    everything = found(recipe_of("nam56r", *keys))
    gradients = everything["data", "all-reduce", "gradients"]
    assert gradients.sent == 2 * gradients.payload * 7 // 8
    assert not any(operation == "all-gather" for _, operation, _ in everything)


def test_a_group_over_several_nodes_sends_over_the_network():
    plan = found(recipe_of("nam56r", "launch.nodes=4", "launch.processes_per_node=4"))
    tokens = plan["expert", "all-to-all", "tokens to their experts and back"]
    assert tokens.over_network == 4 * tokens.payload * 4 // 8  # half of what each of four GPUs has


def test_a_pipeline_over_nodes_sends_its_borders_over_the_network():
    overrides = ("launch.nodes=2", "training.global_batch_size=512")
    pipeline = found(recipe_of("nam56r-pp2-vpp2", *overrides))["pipeline", "send", "hidden states and their gradients"]
    recipe = recipe_of("nam56r-pp2-vpp2", *overrides)
    micro_batches = build_plan(recipe).micro_batches
    assert pipeline.sent == 3 * micro_batches * hidden_bytes(recipe)
    assert pipeline.over_network == 8 * pipeline.sent  # each of the eight ranks' partners is on the other node
    one_node = found(recipe_of("nam56r-pp2-vpp2"))["pipeline", "send", "hidden states and their gradients"]
    assert one_node.over_network == 0


def test_recomputation_sends_again():
    modules = "training.recompute={granularity: selective, modules: [moe]}"
    key = ("expert", "all-to-all", "tokens to their experts and back")
    assert found(recipe_of("nam56r", modules))[key].payload * 2 == 3 * found(recipe_of())[key].payload


def test_the_other_dispatcher_gathers_all_tokens():
    gathered = found(recipe_of("nam56r", "model.families.E.dispatcher=allgather"))
    flow = gathered["tensor and expert", "all-gather", "tokens of all experts"]
    assert flow.payload == 2 * 22 * 16 * 8 * hidden_bytes(recipe_of())
    assert ("expert", "all-to-all", "tokens to their experts and back") not in gathered


def exchanged(*overrides):
    """What one microbatch of 12,288 tokens over four GPUs sends for context parallelism, 2 bytes a number."""
    settings = ("training.global_batch_size=2", *overrides)
    everything = found(recipe_of("nam56r-cp4-12k", *settings))
    return {operation: flow for (axis, operation, _), flow in everything.items() if axis == "context"}


def test_context_parallelism_gathers_for_sparse_layers_and_for_those_beside_them():
    """4 + 9 of its blocks are attention, the latter sparse: a key of 128, an indexer's of 64; 56 heads, recomputed."""
    flows = exchanged()
    blocks = build_plan(recipe_of("nam56r-cp4-12k")).layout
    dense, sparse = len(blocks.numbers("mla")), len(blocks.numbers("dsa"))
    assert (dense, sparse) == (4, 9)
    keys = 56 * (64 + 64 + 64)
    gathered, scattered = flows["all-gather"], flows["reduce-scatter"]
    assert gathered.payload == 12288 * 2 * (dense * 3 * keys + sparse * 2 * (128 + 64))
    assert scattered.payload == 12288 * 2 * (dense * keys + sparse * (128 + 64))
    assert (gathered.size, gathered.sent) == (4, gathered.payload * 3 // 4)
    assert gathered.over_network == 0 and "ring" not in flows and "all-to-all" not in flows
    assert exchanged("training.recompute=null")["all-gather"].payload == 12288 * 2 * (
        dense * 2 * keys + sparse * (128 + 64)
    )
    untaught = exchanged("model.families.A.sparse.loss_coeff=0")["reduce-scatter"]
    assert untaught.payload == 12288 * 2 * (dense * keys + sparse * 128)


def test_context_parallelism_without_sparse_layers_goes_round_a_ring():
    flows = exchanged("model.families.A.sparse=null", "training.recompute=null")
    assert set(flows) == {"ring"}
    # Keys and values once forward, with their gradients backward, to three others.
    assert flows["ring"].sent == 3 * 3 * (12288 // 4) * 2 * 13 * 56 * (64 + 64 + 64)
    # Recomputed, they go round once more.
    again = exchanged("model.families.A.sparse=null")["ring"]
    assert again.sent * 3 == flows["ring"].sent * 4
    over = exchanged(
        "model.families.A.sparse=null",
        "launch.nodes=4",
        "launch.processes_per_node=2",
        "training.recompute=null",
    )["ring"]
    assert over.over_network == over.sent


def test_what_has_no_context_parallelism_is_said_not_to_be_counted():
    text = " ".join(shown("nam56r-cp4-12k").split())
    assert "context 4 1 keys and values all-gather" in text
    assert "not counted: Mamba-3 at layers" in text and "M2RNN at layers" in text
    assert "not counted" not in shown("nam56r", *MANY)


def shown(name, *overrides):
    out = io.StringIO()
    print_plan(build_plan(load_recipe(name, overrides)), Console(file=out, width=160, highlight=False))
    return out.getvalue()


def test_a_plan_of_many_nodes_shows_its_ranks_and_its_traffic():
    text = shown("nam56r-pp2-vpp2", *MANY)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "0 0-7 0-3 0-7 0-1 0" in lines
    assert "63 504-511 0-3 248-255 62-63 1" in lines
    assert any(line.startswith("expert 4 1 tokens to their experts and back") for line in lines)
    assert any(line.startswith("data 256 32 gradients reduce-scatter") for line in lines)
    assert "WARNING" not in text
    assert "ranks on nodes" not in shown("nam56r-tiny")
    assert "hidden states and their gradients" in shown("nam56r-tiny")
    assert "WARNING: expert" in shown("nam56r", "launch.nodes=2", "launch.processes_per_node=4")


def test_amounts_have_a_unit():
    assert [amount(size) for size in (7, 3 * 2**20, 2**30 // 2)] == ["7 B", "3.00 MiB", "0.50 GiB"]
