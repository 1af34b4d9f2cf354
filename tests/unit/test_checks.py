"""What is refused between the fields of a recipe, on the large recipes; see also test_plan.py."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.passthrough import ALLOWED
from megacpp_stp.recipe import list_recipes, load_recipe


def refused(name, overrides):
    with pytest.raises(UserError) as caught:
        build_plan(load_recipe(name, overrides))
    assert caught.value.fix
    return caught.value


UPSTREAM = ("model.families.A.sparse.kernel=upstream",)
WIDE = (*UPSTREAM, "model.families.A.kv_lora_rank=512")
TILELANG = "megatron.dsa-kernel-backend=tilelang"


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_planned(name):
    assert build_plan(load_recipe(name)).argv


PP2 = ["parallel.pipeline=2", "parallel.expert=4"]


@pytest.mark.parametrize(
    ("name", "overrides", "field"),
    [
        # Precision
        ("nam56r", ["training.precision=fp16"], "training.loss_scale"),
        (
            "nam56r",
            ["training.loss_scale={initial: 65536.0, minimum: 1.0, window: 10, hysteresis: 2}"],
            "training.loss_scale",
        ),
        (
            "nam56r",
            [
                "training.precision=fp16",
                "training.loss_scale={initial: 8.0, minimum: 16.0, window: 10, hysteresis: 2}",
            ],
            "training.loss_scale.minimum",
        ),
        # World and batch
        ("nam56r", ["parallel.tensor=3"], "launch.processes_per_node"),
        ("nam56r", ["training.global_batch_size=250"], "training.global_batch_size"),
        ("nam56r", ["parallel.virtual=2", "parallel.stages=[26, 26]"], "parallel.virtual"),
        # Experts
        ("nam56r", ["parallel.expert=3"], "parallel.expert"),
        ("nam56r", ["parallel.expert=16"], "parallel.expert"),  # divides the experts, not the ranks
        ("nam52", ["parallel.expert=2"], "parallel.expert"),  # no experts
        ("nam56r", ["model.families.E.topk=17"], "model.families.E.topk"),
        ("nam56r", ["parallel.tensor=2", "parallel.expert=4"], "parallel.sequence_parallel"),
        # Heads and widths over tensor parallelism
        ("nam56r-tp2-sp", ["model.heads=7"], "parallel.tensor"),
        ("nam52", ["parallel.tensor=8", "model.families.A.kv_groups=4"], "parallel.tensor"),
        ("nam52", ["model.families.A.kv_groups=3"], "model.families.A.kv_groups"),
        ("nam56r-tp2-sp", ["model.ffn_hidden_size=18945"], "parallel.tensor"),
        ("nam56r-tp2-sp", ["model.families.E.ffn_hidden_size=897"], "parallel.tensor"),
        ("nam56r-tp2-sp", ["model.families.E.shared_ffn_hidden_size=1025"], "parallel.tensor"),
        ("nam56r", ["model.heads=60"], "model.hidden_size"),
        # State-space and recurrent heads
        ("nam56r", ["model.families.M.groups=5"], "model.families.M.groups"),
        ("nam56r-tp2-sp", ["model.families.M.groups=1"], "parallel.tensor"),
        ("nam56r-tp2-sp", ["model.families.R.heads=45"], "parallel.tensor"),
        ("nam56r-tp2-sp", ["model.families.R.key_dim=63"], "parallel.tensor"),
        ("nam56r-cp4-12k", ["model.families.R.heads=45"], "parallel.context"),
        ("nam52", ["parallel.context=8", "model.families.M.heads=84", "model.families.M.groups=4"], "parallel.context"),
        ("nam52", ["parallel.context=2", "model.families.M.heads=84", "model.families.M.groups=3"], "parallel.context"),
        (
            "nam56r",
            ["model.families.M.complex_rotation=true", "model.families.M.state_dim=6"],
            "model.families.M.state_dim",
        ),
        # The sequence over ranks
        ("nam56r-cp4-12k", ["training.sequence_length=12290"], "training.sequence_length"),
        ("nam56r-tp2-sp", ["training.sequence_length=4097"], "training.sequence_length"),
        # Pipeline ranks without what upstream waits for
        (
            "nam56r",
            [*PP2, "parallel.stages=[51, 1]", "model.depth=52", "model.pattern=AEM", "model.families.R=null"],
            "parallel.stages",
        ),
        ("nam56r", [*PP2, "parallel.stages=[4, 48]"], "parallel.stages"),  # rank 0 has no D
        ("nam56r", [*PP2, "parallel.stages=[26]"], "parallel.stages"),
        ("nam56r", [*PP2, "parallel.stages=[26, 25]"], "parallel.stages"),
        # Attention
        ("nam52", ["model.families.A.head_dim=15"], "model.families.A.head_dim"),
        ("nam56r", ["model.rope.base=1"], "model.rope.base"),
        (
            "nam56r",
            [
                "model.families.E.topk=1",
                "model.families.E.router.score_function=softmax",
                "model.families.E.router.expert_bias=false",
            ],
            "model.families.E.topk",
        ),
        (
            "nam56r",
            ["training.micro_batch_size=10000", "training.global_batch_size=80000"],
            "training.micro_batch_size",
        ),
        ("nam56r", ["model.families.A.sparse.indexer_head_dim=32"], "model.families.A.sparse.indexer_head_dim"),
        ("nam56r", ["megatron.dsa-kernel-backend=tilelang"], "megatron.dsa-kernel-backend"),
        # Upstream would take its plain path for such latents, without a word.
        ("nam56r", [*UPSTREAM, "megatron.dsa-kernel-backend=cudnn"], "megatron.dsa-kernel-backend"),
        ("nam56r", [*WIDE, "model.families.A.qk_pos_emb_head_dim=32", TILELANG], "megatron.dsa-kernel-backend"),
        ("nam56r", ["megatron.attention-backend=unfused"], "megatron.attention-backend"),
        ("nam56r", ["model.families.A.qk_pos_emb_head_dim=63"], "model.families.A.qk_pos_emb_head_dim"),
        # Backend
        ("nam56r", ["model.backend=torch"], "model.families.E.grouped_gemm"),
        (
            "nam56r-tiny",
            ["training.recompute={granularity: selective, modules: [layernorm]}"],
            "training.recompute.modules",
        ),
        (
            "nam52",
            [
                "model.backend=torch",
                "model.families.M={block: mamba2, heads: 80, head_dim: 64, state_dim: 128, groups: 8}",
            ],
            "model.families.M.block",
        ),
        # Recomputation
        *(
            (name, [f"training.recompute={{granularity: {kind}, modules: {modules}}}"], "training.recompute.modules")
            for name, kind, modules in (
                ("nam52", "selective", "[moe]"),
                ("nam52", "selective", "[]"),
                ("nam52", "full", "[mlp]"),
                ("nam52", "selective", "[mlp, mlp]"),
                ("nam52", "selective", "[mla_up_proj]"),
                ("nam56r-tiny", "selective", "[moe_act]"),
            )
        ),
        # Optimizer
        ("nam56r", ["optimizer.overlap_grad_reduce=false"], "optimizer.overlap_param_gather"),
        ("nam56r", ["optimizer.distributed=false"], "optimizer.overlap_param_gather"),
        # STP
        ("nam56r", ["stp.taps=[53]"], "stp.taps"),
        ("nam56r", ["stp.start_step=50000"], "stp.start_step"),
    ],
)
def test_refused(name, overrides, field):
    assert refused(name, overrides).field == field


def test_a_rank_without_sparse_attention_is_right_when_the_indexer_has_no_loss():
    overrides = [*PP2, "parallel.stages=[4, 48]", "model.families.A.sparse.loss_coeff=0"]
    assert build_plan(load_recipe("nam56r", overrides)).layout.stages == (4, 48)


@pytest.mark.parametrize(
    ("key", "where"),
    [
        (
            "model.families.A={block: attention, head_dim: 64, kv_groups: 8, dense_mlp: false, sparse: null}",
            "block mla",
        ),
        ("model.families.M={block: mamba2, heads: 8, head_dim: 64, state_dim: 64, groups: 8, topk: 4}", "family E"),
        ("model.families.E={block: moe, kv_groups: 2}", "block attention"),
    ],
)
def test_a_feature_on_the_wrong_family_is_refused_with_where_it_belongs(key, where):
    with pytest.raises(UserError, match="no key of this block") as caught:
        load_recipe("nam56r", [key])
    assert where in caught.value.fix


def test_transformer_engine_is_not_planned_for_a_cpu():
    with pytest.raises(UserError) as caught:
        build_plan(load_recipe("nam56r"), device="cpu")
    assert caught.value.field == "model.backend"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("megatron.num-layers=52", "megatron.num-layers"),
        ("megatron.use-distributed-optimizer=true", "megatron.use-distributed-optimizer"),
        ("megatron.moe-z-loss-coeff=0.1", "megatron.moe-z-loss-coeff"),
        ("megatron.make-vocab-size-divisible-by=1000", "megatron.make-vocab-size-divisible-by"),
        ("megatron.grad-reduce-in-bf16=true", "megatron.grad-reduce-in-bf16"),
        ("megatron.qk-layernorm=true", "megatron.qk-layernorm"),
        ("megatron.local-rank=3", "megatron.local-rank"),
        ("megatron.lr=1", "megatron.lr"),
        ("megatron.hybrid-layer-pattern=M", "megatron.hybrid-layer-pattern"),
        ("megatron.hybrid-override-pattern=M", "megatron.hybrid-override-pattern"),
        ("megatron.mtp-num-layers=2", "megatron.mtp-num-layers"),
        ("megatron.pipeline-model-parallel-layout=E|t*52|L", "megatron.pipeline-model-parallel-layout"),
        ("megatron.num-layers-per-virtual-pipeline-stage=2", "megatron.num-layers-per-virtual-pipeline-stage"),
        ("megatron.account-for-loss-in-pipeline-split=true", "megatron.account-for-loss-in-pipeline-split"),
        ("megatron.mock-data=true", "megatron.mock-data"),
        ("megatron.nam-device=cpu", "megatron.nam-device"),
        ("megatron.log-throughput=false", "megatron.log-throughput"),
    ],
)
def test_an_option_that_contradicts_the_recipe_is_refused(override, field):
    assert refused("nam56r", [override]).field == field


def test_options_are_passed_on_in_the_order_of_their_names():
    overrides = ["megatron.profile-ranks=[1, 7]", "megatron.log-throughput=true", "megatron.attention-backend=flash"]
    argv = build_plan(load_recipe("nam56r", overrides)).argv
    assert argv[-6:] == ["--attention-backend", "flash", "--log-throughput", "--profile-ranks", "1", "7"]
    again = build_plan(load_recipe("nam56r", overrides[::-1]))
    assert again.argv == argv


def test_what_can_be_passed_on_exists_and_is_said_by_no_key():
    """The list against Megatron's own parser, and against every option that a plan emits."""
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    known = {option: action.dest for action in parser._actions for option in action.option_strings}
    assert {f"--{name}" for name in ALLOWED} <= known.keys()
    source = (Path(__file__).parents[2] / "megacpp_stp" / "plan" / "argv.py").read_text(encoding="utf-8")
    emitted = {known[option] for option in re.findall(r"--[a-z0-9-]+", source) if option in known}
    assert len(emitted) > 80
    assert not emitted & {known[f"--{name}"] for name in ALLOWED}


def test_the_documented_list_is_the_list():
    document = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = document.split("## Options of Megatron that have no key")[1].split("##")[0]
    assert set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", section)) - {"check", "profile"} == ALLOWED - {"profile"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "in chunks (dsa-memory)"),
        (UPSTREAM, "dsa-memory is off"),
        ((*WIDE, TILELANG), "upstream's tilelang kernels; dsa-memory is not needed"),
    ],
)
def test_the_plan_says_what_computes_sparse_attention(capsys, overrides, says):
    from megacpp_stp.cli.app import run

    assert run(["plan", "nam56r", *(token for one in overrides for token in ("--set", one))]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sparse attention"))
    assert says in line
