"""Fp8 without a GPU: in which layers Megatron's real stack computes its products in fp8, on a double of its modules.

The double says in which region each product was computed, and refuses sizes that fp8 has no products for; its numbers
are bf16's.
"""

from __future__ import annotations

from typing import Any

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from tests.parity.nam import BASE, Training
from tests.parity.test_te_backend import GROUPED, ONE, TE, as_on_hopper, on_the_double

SIZES = (
    *BASE,
    *ONE,
    TE,
    GROUPED,
    "model.families.A={block: mla, q_lora_rank: 32, kv_lora_rank: 32, qk_head_dim: 16, qk_pos_emb_head_dim: 16, "
    "v_head_dim: 16, dense_mlp: false, sparse: {ranks: [1, 2], indexer_heads: 16, indexer_head_dim: 16, topk: 12, "
    "kernel: upstream, loss: dense, loss_coeff: 0.1}}",
    "model.families.M={block: mamba3, heads: 16, head_dim: 4, state_dim: 16, groups: 2, chunk_size: 16, "
    "complex_rotation: true, mimo_rank: 1, kernel: torch}",
    "model.mtp=null",
    "training.precision=bf16",
    "training.checkpoint=null",
)
TENSORWISE = "training.fp8={format: hybrid, scaling: tensorwise, amax_history: null, families: [A, E, M]}"
DELAYED = "training.fp8={format: e4m3, scaling: delayed, amax_history: 16, families: [A, M]}"


def products(overrides: tuple[str, ...]) -> dict[int, set[str | None]]:
    """By layer number, the recipes under which its products were computed in one step."""
    as_on_hopper()
    model = Training(overrides)
    model.step(0)
    found: dict[int, set[str | None]] = {}
    for layer in model.chunks[0].decoder.layers:
        linears = [module for module in layer.modules() if hasattr(module, "recipe")]
        found[layer.layer_number] = {module.recipe and type(module.recipe).__name__ for module in linears}
    return found


def all_products(variants: list[tuple[str, ...]]) -> list[dict[int, set[str | None]]]:
    return [products(overrides) for overrides in variants]


@pytest.fixture(scope="module")
def found():
    variants = [SIZES, (*SIZES, TENSORWISE), (*SIZES, DELAYED)]
    return dict(zip([None, TENSORWISE, DELAYED], on_the_double(all_products, 1, variants)[0], strict=True))


def families_of(overrides: tuple[str, ...]) -> dict[int, str]:
    return {layer.number: layer.family for layer in build_plan(load_recipe("nam56r-tiny", overrides)).layout.layers}


@pytest.mark.parametrize(
    ("fp8", "name", "there"),
    [(TENSORWISE, "Float8CurrentScaling", "AEM"), (DELAYED, "TEDelayedScaling", "AM")],
)
def test_products_of_the_named_families_are_in_fp8_and_the_others_are_not(found, fp8, name, there):
    wanted = {number: {name if family in there else None} for number, family in families_of((*SIZES, fp8)).items()}
    assert found[fp8] == wanted
    assert {"A", "E", "M", "R"} == set(families_of((*SIZES, fp8)).values())


def test_without_fp8_no_product_is(found):
    assert set().union(*found[None].values()) == {None}


def plan_of(*overrides: str) -> Any:
    return build_plan(load_recipe("nam56r", overrides), device="cuda")


NAM56R = "training.fp8={format: hybrid, scaling: tensorwise, amax_history: null, families: [A, E, M]}"

TENSOR = (
    NAM56R.replace("[A, E, M]", "[A, E]"),
    "parallel.tensor=2",
    "parallel.expert=4",
    "parallel.sequence_parallel=true",
)


def test_argv_says_which_layers_stay_bf16():
    argv = list(plan_of(NAM56R).argv)
    place = argv.index("--fp8-format")
    assert argv[place : place + 7] == (
        [
            "--fp8-format",
            "hybrid",
            "--fp8-recipe",
            "tensorwise",
            "--no-stream-ckpt-dequant",
            "--nam-bf16-layers",
            "12,24,36,48",
        ]
    )
    assert not [token for token in plan_of().argv if "fp8" in token or "bf16-layers" in token]


@pytest.mark.parametrize(
    ("overrides", "field", "why"),
    [
        ((NAM56R.replace("[A, E, M]", "[A, R]"),), "training.fp8.families", "1580 channels"),
        ((NAM56R, "parallel.tensor=2", "parallel.expert=4", "parallel.sequence_parallel=true"), "", "8360 channels"),
        ((NAM56R, "training.precision=fp32"), "training.fp8", "casts bf16 weights"),
        ((NAM56R, "training.sequence_length=4090", "training.micro_batch_size=1"), "", "4090 tokens on a rank"),
        ((NAM56R.replace("tensorwise", "delayed"),), "training.fp8.amax_history", "delayed scaling takes"),
        ((NAM56R.replace("null", "1024"),), "training.fp8.amax_history", "is for delayed scaling alone"),
        ((NAM56R.replace("tensorwise", "delayed").replace("null", "8"),), "training.recompute.modules", "moe_act"),
        ((NAM56R.replace("[A, E, M]", "[A, A]"),), "training.fp8.families", "twice"),
        ((NAM56R.replace("[A, E, M]", "[E]"), "model.mtp={depths: 1, pattern: A, loss_coeff: 0.3}"), "", "A out"),
        ((*TENSOR, "training.sequence_length=4112", "training.micro_batch_size=1"), "", "2056 tokens on a rank"),
        (
            (*TENSOR, "model.hidden_size=3696", "model.mtp={depths: 1, pattern: A, loss_coeff: 0.3}"),
            "model.mtp",
            "1848",
        ),
    ],
)
def test_what_fp8_cannot_do_is_refused(overrides, field, why):
    with pytest.raises(UserError) as caught:
        plan_of(*overrides)
    assert why in str(caught.value) and str(caught.value).startswith(field)


def test_a_family_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="is not in the pattern"):
        build_plan(load_recipe("nam52", (NAM56R.replace("[A, E, M]", "[E]"), "model.backend=te")), device="cuda")


@pytest.mark.parametrize(
    ("name", "family", "override", "what"),
    [
        ("nam56r", "A", "model.families.A.q_lora_rank=72", "72 channels"),
        ("nam56r", "A", "model.families.A.kv_lora_rank=72", "136 channels"),
        ("nam56r", "A", "model.families.A.qk_head_dim=65", "query"),
        ("nam56r", "A", "model.families.A.v_head_dim=65", "key and value"),
        ("nam56r", "A", "model.families.A.sparse.indexer_head_dim=72", "indexer_head_dim"),
        ("nam56r", "A", "model.families.A.sparse.indexer_heads=24", "indexer_heads"),
        ("nam56r", "E", "model.families.E.ffn_hidden_size=904", "E.ffn_hidden_size"),
        ("nam56r", "E", "model.families.E.shared_ffn_hidden_size=1032", "E.shared_ffn_hidden_size"),
        ("nam52", "A", "model.ffn_hidden_size=9224", "model.ffn_hidden_size"),
    ],
)
def test_each_width_of_a_product_counts(name, family, override, what):
    def plan(fp8: str) -> Any:
        return build_plan(load_recipe(name, ("model.backend=te", override, fp8)), device="cuda")

    plan("training.fp8=null")
    fp8 = NAM56R.replace("[A, E, M]", f"[{family}]")
    with pytest.raises(UserError, match="and fp8 needs a multiple of 16") as caught:
        plan(fp8)
    assert what in str(caught.value)


def test_one_tensor_parallel_rank_may_have_the_widths_that_two_may_not():
    plan_of(NAM56R, "training.sequence_length=4112", "training.micro_batch_size=1")
    plan_of(NAM56R, "model.hidden_size=3696", "model.mtp={depths: 1, pattern: A, loss_coeff: 0.3}")
    plan_of(*TENSOR)


def test_the_torch_backend_has_no_fp8():
    with pytest.raises(UserError, match="Transformer Engine's"):
        build_plan(load_recipe("nam56r-tiny", (TENSORWISE, "training.precision=bf16")))
