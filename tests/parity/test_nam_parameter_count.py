"""Weights of the shipped recipes, built by the product's own spec without memory, against the planner's count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megacpp_stp.plan.parameters import parts
from megacpp_stp.recipe import list_recipes, load_recipe
from megacpp_stp.recipe.schema import Recipe
from tests.parity._gloo import run_ranks
from tests.parity.nam import ALL_LETTERS, arguments_of
from tests.parity.test_parameter_count import as_planned, chunk_weights, counted, lowered

# Of the large recipes, what the torch backend cannot do, none of which has weights; and one rank for all of it.
PLAIN = ("model.backend=torch", "launch.processes_per_node=1", "launch.nodes=1", "training.recompute=null")
ONE_RANK = (
    "parallel={tensor: 1, pipeline: 1, virtual: 1, context: 1, expert: 1, sequence_parallel: false, stages: auto}"
)


EVERY_LETTER = "every letter, rotation, multi-token prediction"
CASES = [*list_recipes(), EVERY_LETTER]


def on_one_rank(name: str) -> Recipe:
    if name == EVERY_LETTER:
        return load_recipe("nam56r-tiny", (*ALL_LETTERS, *PLAIN, ONE_RANK))
    overrides = (*PLAIN, ONE_RANK, "optimizer.overlap_param_gather=false")
    if load_recipe(name).model.families.E is not None:
        overrides = (*overrides, "model.families.E.grouped_gemm=false")
    return load_recipe(name, overrides)


def built(names: list[str]) -> dict[str, Counter[tuple[str, str]]]:
    """Each weight of each recipe's model, on the meta device: shapes and no memory."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import hybrid_config_from_args

    found: dict[str, Any] = {}
    for name in names:
        config = hybrid_config_from_args(arguments_of(on_one_rank(name)))
        config.transformer.perform_initialization = False
        with torch.device("meta"):
            model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        found[name] = chunk_weights(model)
    return found


@pytest.fixture(scope="module")
def models():
    return run_ranks(built, 1, CASES, timeout=300)[0]


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_every_recipe(models, name):
    recipe = on_one_rank(name)
    assert as_planned(models[name]) == counted(parts(recipe, lowered(recipe)))
