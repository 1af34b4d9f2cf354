"""The count of parameters against the models that Megatron builds from a recipe's own arguments, layer by layer."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import pytest

from megacpp_stp.plan.argv import emit
from megacpp_stp.plan.lowering import HybridPlan, lower
from megacpp_stp.plan.parameters import Part, parts
from megacpp_stp.plan.stages import choose_stages
from megacpp_stp.recipe import load_recipe
from megacpp_stp.recipe.schema import Recipe
from tests.parity._gloo import Layout, run_ranks
from tests.recipes import STAND_INS

GQA = "model.families.A={block: attention, head_dim: 48, kv_groups: 2, dense_mlp: false}"
SPARSE = (
    "model.families.A.sparse={ranks: [0, 2], indexer_heads: 2, indexer_head_dim: 24, topk: 16, "
    "kernel: upstream, loss: dense, loss_coeff: 0.01}"
)
MAMBA3 = (
    "model.families.M={block: mamba3, heads: 4, head_dim: 64, state_dim: 16, groups: 2, chunk_size: 16, "
    "complex_rotation: false, mimo_rank: 1, kernel: torch}"
)
M2RNN = (
    "model.families.R={block: m2rnn, heads: 6, key_dim: 16, value_dim: 8, conv_kernel: 3, checkpoint_every: 16, "
    "kernel: torch}"
)
PREDICTION = "model.mtp={depths: 2, pattern: AE, loss_coeff: 0.3}"
DENSE_MLP = "model.families.A.dense_mlp=true"
ONE_STAGE = ("parallel.pipeline=1", "parallel.stages=[12]")
NO_SHARED_EXPERT = "model.families.E.shared_ffn_hidden_size=0"
ON_ONE_RANK = {
    "as it is": (),
    "swiglu": ("model.activation=swiglu",),
    "gelu": ("model.activation=gelu",),
    "grouped-query attention": (GQA,),
    "multi-head attention": ("model.families.A={block: attention, head_dim: 32, kv_groups: 4, dense_mlp: false}",),
    "tied": ("model.tie_embeddings=true",),
    "no shared expert, swiglu": (NO_SHARED_EXPERT, "model.activation=swiglu"),
    "one expert a token": ("model.families.E.topk=1", "model.families.E.experts=8"),
    "padded vocabulary": ("model.vocab_size=4000",),
    "no expert bias": ("model.families.E.router.expert_bias=false",),
    "no experts": ("model.pattern=AMAR", "model.families.E=null"),
    "sparse attention": (SPARSE,),
    "sparse attention, prediction": (SPARSE, PREDICTION),
    "prediction, tied": (PREDICTION, "model.tie_embeddings=true"),
    "prediction of a dense layer": (DENSE_MLP, "model.mtp={depths: 1, pattern: A, loss_coeff: 0.3}"),
    "dense layers in attention blocks": (DENSE_MLP, "stp.taps=[6,15]"),
    "mamba3": (MAMBA3,),
    "mamba3, rotated": (MAMBA3.replace("false", "true"), "model.families.M.state_dim=22"),
    "mamba3, several inputs": (MAMBA3.replace("mimo_rank: 1", "mimo_rank: 3"),),
    "m2rnn": (M2RNN,),
    "both recurrent": (MAMBA3, M2RNN),
    "small heads": ("model.families.A.qk_pos_emb_head_dim=2", "model.families.A.v_head_dim=8"),
}
VIRTUAL = ("parallel.virtual=2", "parallel.stages=[2,5,3,2]")


def built(pipeline: int, virtual: int | None, variants: list[list[str]], vocab_sizes: list[int]) -> list[Any]:
    """What this rank's parameters are, for each variant: name by name, under global layer numbers."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, found = groups.pp.rank(), []
    for argv, vocab_size in zip(variants, vocab_sizes, strict=True):
        model_config = parsed(argv, vocab_size)
        weights: Counter[tuple[str, str]] = Counter()
        for stage in range(virtual or 1):
            chunk = model_config.get_builder_cls()(model_config).build_model(
                groups,
                pre_process=rank == 0 and stage == 0,
                post_process=rank == pipeline - 1 and stage == (virtual or 1) - 1,
                vp_stage=stage if virtual else None,
            )
            weights += chunk_weights(chunk)
        found.append(weights)
    return found


def parsed(argv: list[str], vocab_size: int) -> Any:
    """Megatron's own way from arguments to a model configuration; with a spec that has all layers of its pattern."""
    from megatron.training.argument_utils import hybrid_config_from_args

    args = parsed_arguments(argv, vocab_size)
    config = hybrid_config_from_args(args)
    if set(args.hybrid_layer_pattern) & set("DM/"):
        from megacpp_stp.model.slots import Slots
        from megacpp_stp.model.specs import torch_stack_spec

        config.hybrid_stack_spec = torch_stack_spec(Slots.from_arguments(args))
    return config


def parsed_arguments(argv: list[str], vocab_size: int) -> Any:
    """Megatron's own reading of a plan's arguments, on one rank."""
    import torch.distributed as dist
    from megatron.training.arguments import parse_args, validate_args

    from megacpp_stp.training.arguments import add_nam_arguments

    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
    sys.argv[1:] = [*argv, "--nam-plan", "plan.json", "--nam-run-dir", "."]
    args = parse_args(extra_args_provider=add_nam_arguments)
    validate_args(args)
    args.vocab_size = vocab_size  # what the tokenizer would say; Megatron pads it
    return args


def chunk_weights(chunk: Any) -> Counter[tuple[str, str]]:
    """Elements by (part, weight's name in it)."""
    found: Counter[tuple[str, str]] = Counter()
    for layer in chunk.decoder.layers:
        for name, parameter in layer.named_parameters():
            found[f"layer {layer.layer_number}", name] += parameter.numel()
    for name, parameter in chunk.named_parameters():
        if name.startswith("mtp."):
            _, _, depth, *rest = name.split(".")
            part = f"mtp {int(depth) + 1}"
            if rest[0] == "mtp_model_layer":
                part += f" layer {int(rest[2]) + 1}"
                rest = rest[3:]
            found[part, ".".join(rest)] += parameter.numel()
        elif name.startswith("embedding"):
            found["embedding" if chunk.pre_process else "mtp 1", name] += parameter.numel()
        elif "decoder.layers." not in name:
            found["output", name] += parameter.numel()
    return found


def counted(chosen: tuple[Part, ...], *, tensor: int = 1, expert: int = 1) -> Counter[tuple[str, str]]:
    """The same from the plan, under the same names."""
    return Counter(
        {
            (part.name, weight.name): weight.on_gpu(tensor=tensor, expert=expert)
            for part in chosen
            for weight in (*part.weights, *part.copies)
        }
    )


def as_planned(weights: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Megatron's names cut to the plan's: local experts together, no trailing ``weight``."""
    merged: Counter[tuple[str, str]] = Counter()
    for (part, name), elements in weights.items():
        pieces = name.removesuffix(".weight").split(".")
        if "local_experts" in pieces:
            place = pieces.index("local_experts")
            del pieces[place : place + 2]
        merged[part, ".".join(pieces)] += elements
    return merged


def lowered(recipe: Recipe) -> HybridPlan:
    return lower(recipe, stages=choose_stages(recipe))


def compare(variants: dict[str, tuple[str, ...]], layout: Layout, *, data: int = 1) -> None:
    world = layout.pipeline * layout.tensor * data
    recipes = {
        name: load_recipe(STAND_INS, (f"launch.processes_per_node={world}", *overrides))
        for name, overrides in variants.items()
    }
    layouts = {name: lowered(recipe) for name, recipe in recipes.items()}
    argvs = [
        [token for argument in emit(recipe, layouts[name], device="cpu") for token in argument.tokens]
        for name, recipe in recipes.items()
    ]
    sizes = [recipe.model.vocab_size for recipe in recipes.values()]
    results = run_ranks(built, world, layout.pipeline, layout.virtual, argvs, sizes, layout=layout, timeout=300)
    for index, (name, recipe) in enumerate(recipes.items()):
        all_parts = parts(recipe, layouts[name])
        for rank, result in enumerate(results):
            stage = rank // (world // layout.pipeline)
            mine = tuple(part for part in all_parts if part.segment % layout.pipeline == stage)
            wanted = counted(mine, tensor=layout.tensor, expert=layout.expert)
            assert as_planned(result[index]) == wanted, (name, rank)


def test_every_weight_on_one_rank():
    compare({name: (*ONE_STAGE, *overrides) for name, overrides in ON_ONE_RANK.items()}, Layout())


def test_every_weight_on_each_pipeline_rank():
    tied = "model.tie_embeddings=true"
    variants = {"as it is": (), "tied": (tied,), "prediction": (PREDICTION,), "prediction, tied": (PREDICTION, tied)}
    compare(variants, Layout(pipeline=2))


def test_every_weight_over_virtual_stages():
    variants = {"uneven": (), "tied": ("model.tie_embeddings=true",), "prediction": (PREDICTION,)}
    compare({name: (*VIRTUAL, *more) for name, more in variants.items()}, Layout(pipeline=2, virtual=2))


@pytest.mark.parametrize(
    ("layout", "data", "overrides"),
    [
        (Layout(tensor=2), 1, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
        (Layout(expert=2), 2, ("parallel.expert=2",)),
    ],
    ids=["tensor", "expert"],
)
def test_every_weight_cut_over_a_group(layout, data, overrides):
    variants = {
        "as it is": (),
        "attention": (GQA,),
        "sparse attention, prediction": (SPARSE, PREDICTION),
        "both recurrent": (MAMBA3, M2RNN),
        "rotated": (MAMBA3.replace("false", "true"),),
    }
    compare({name: (*ONE_STAGE, *overrides, *more) for name, more in variants.items()}, layout, data=data)
