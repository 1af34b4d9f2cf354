"""The count of parameters against the models that Megatron builds from a recipe's own arguments, layer by layer."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import pytest

from megacpp_stp.plan.argv import emit
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.parameters import Part, parts
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import Layout, run_ranks

GQA = "model.families.A={block: attention, head_dim: 48, kv_groups: 2}"
ONE_STAGE = ("parallel.pipeline=1", "parallel.stages=[12]")
NO_SHARED_EXPERT = "model.families.E.shared_ffn_hidden_size=0"
ON_ONE_RANK = {
    "as it is": (),
    "swiglu": ("model.activation=swiglu",),
    "gelu": ("model.activation=gelu",),
    "grouped-query attention": (GQA,),
    "multi-head attention": ("model.families.A={block: attention, head_dim: 32, kv_groups: 4}",),
    "tied": ("model.tie_embeddings=true",),
    "no shared expert, swiglu": (NO_SHARED_EXPERT, "model.activation=swiglu"),
    "one expert a token": ("model.families.E.topk=1", "model.families.E.experts=8"),
    "padded vocabulary": ("model.vocab_size=4000",),
    "no expert bias": ("model.families.E.router.expert_bias=false",),
    "no experts": ("model.pattern=AMAR", "model.families.E=null"),
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
    """Megatron's own way from arguments to a model configuration."""
    from megatron.training.argument_utils import hybrid_config_from_args

    return hybrid_config_from_args(parsed_arguments(argv, vocab_size))


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
        if "decoder.layers." not in name:
            found["embedding" if name.startswith("embedding") else "output", name] += parameter.numel()
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


def compare(variants: dict[str, tuple[str, ...]], layout: Layout, *, data: int = 1) -> None:
    world = layout.pipeline * layout.tensor * data
    recipes = {
        name: load_recipe("nam56r-tiny", (f"launch.processes_per_node={world}", *overrides))
        for name, overrides in variants.items()
    }
    layouts = {name: lower(recipe) for name, recipe in recipes.items()}
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
    compare({"as it is": (), "tied": ("model.tie_embeddings=true",)}, Layout(pipeline=2))


def test_every_weight_over_virtual_stages():
    compare({"uneven": VIRTUAL, "tied": ("model.tie_embeddings=true", *VIRTUAL)}, Layout(pipeline=2, virtual=2))


@pytest.mark.parametrize(
    ("layout", "data", "overrides"),
    [
        (Layout(tensor=2), 1, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
        (Layout(expert=2), 2, ("parallel.expert=2",)),
    ],
    ids=["tensor", "expert"],
)
def test_every_weight_cut_over_a_group(layout, data, overrides):
    variants = {"as it is": (*ONE_STAGE, *overrides), "attention": (*ONE_STAGE, *overrides, GQA)}
    compare(variants, layout, data=data)
