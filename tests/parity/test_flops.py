"""FLOPs a token against upstream's own formula, where that one is right: no MLA, and no router in it."""

from __future__ import annotations

import pytest

from megacpp_stp.plan.argv import emit
from megacpp_stp.plan.flops import MULTIPLY_ADD, TRAINING_TO_FORWARD, total
from megacpp_stp.plan.parameters import padded_vocab_size, parts
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import run_ranks
from tests.parity.test_parameter_count import GQA, ONE_STAGE, PREDICTION, lowered, parsed_arguments
from tests.recipes import STAND_INS

VARIANTS = {
    "grouped-query attention": (GQA,),
    "swiglu, tied, no shared expert": (
        GQA,
        "model.activation=swiglu",
        "model.tie_embeddings=true",
        "model.families.E.shared_ffn_hidden_size=0",
    ),
    "no experts": (GQA, "model.pattern=AMAR", "model.families.E=null"),
    # Upstream takes the inner width for twice the hidden one.
    "mamba2": (GQA, "model.families.M={block: mamba2, heads: 8, head_dim: 32, state_dim: 24, groups: 2}"),
    "prediction": (GQA, PREDICTION),
}


def upstream(cases: list[tuple[list[str], int, int]]) -> list[float]:
    """Training FLOPs of one sequence."""
    from megatron.training.training import num_floating_point_operations

    found = []
    for argv, vocab_size, rows in cases:
        args = parsed_arguments(argv, vocab_size)
        args.padded_vocab_size = rows
        found.append(num_floating_point_operations(args, 1))
    return found


LEFT_OUT = ("mlp.router", "eh_proj")


def test_they_are_upstreams_but_for_two_products_that_it_leaves_out():
    overrides = {name: (*ONE_STAGE, "launch.processes_per_node=1", *more) for name, more in VARIANTS.items()}
    recipes = [load_recipe(STAND_INS, chosen) for chosen in overrides.values()]
    argvs = [[token for argument in emit(r, lowered(r), device="cpu") for token in argument.tokens] for r in recipes]
    cases = [(argv, r.model.vocab_size, padded_vocab_size(r)) for argv, r in zip(argvs, recipes, strict=True)]
    for name, recipe, expected in zip(VARIANTS, recipes, run_ranks(upstream, 1, cases)[0], strict=True):
        chosen = parts(recipe, lowered(recipe))
        left_out = sum(weight.count for part in chosen for weight in part.weights if weight.name in LEFT_OUT)
        ours = total(recipe, chosen).training - TRAINING_TO_FORWARD * MULTIPLY_ADD * left_out
        assert ours * recipe.training.sequence_length == pytest.approx(expected, rel=1e-12), name
