"""The te backend without a GPU: Megatron's real layers on a double of Transformer Engine, against the torch backend.

The double (`tests.te_double`) has the constructors of Transformer Engine's modules and their formulas, so what is
proven here is everything around them: which class is where, each norm once, names, shapes and counts of parameters, and
that the whole trains as the torch backend does.  The modules themselves are for `tests/gpu/test_te_backend.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megacpp_stp.plan.parameters import parts
from megacpp_stp.recipe import list_recipes, load_recipe
from megacpp_stp.recipe.schema import Recipe
from tests.parity._gloo import Layout, run_ranks
from tests.parity.nam import ALL_LETTERS, NO_EXPERTS, Outcome, Training, arguments_of, train
from tests.parity.te_layers import KINDS, Errors, compare
from tests.parity.te_names import torch_name
from tests.parity.test_parameter_count import as_planned, chunk_weights, counted, lowered
from tests.te_double import PATH

ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")
TE = "model.backend=te"
GROUPED = "model.families.E.grouped_gemm=true"
AGAIN = "training.recompute={granularity: selective, modules: [core_attn, mla_up_proj, moe_act, layernorm]}"
STEPS = 2
MODELS = {
    "every letter": (*ALL_LETTERS, *ONE),
    "grouped-query attention and MLPs": (*NO_EXPERTS, *ONE),
}


def on_the_double(fn: Callable[..., Any], world: int, *args: Any, **kwargs: Any) -> list[Any]:
    """`run_ranks`, with the double where the ranks look for Transformer Engine."""
    sys.path.insert(0, PATH)
    try:
        return run_ranks(fn, world, *args, timeout=300, **kwargs)
    finally:
        sys.path.remove(PATH)


def as_on_hopper() -> None:
    """Megatron's validation asks the GPU whether it can group products."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


# --- training ---------------------------------------------------------------------------------------


def trained(variants: list[tuple[str, ...]]) -> list[Outcome]:
    as_on_hopper()
    return [train(overrides, STEPS) for overrides in variants]


@pytest.fixture(scope="module")
def by_torch():
    return dict(zip(MODELS, run_ranks(trained, 1, list(MODELS.values()), timeout=300)[0], strict=True))


@pytest.fixture(scope="module")
def by_te():
    every, plain = MODELS.values()
    variants = {
        "one expert at a time": ("every letter", (*every, TE)),
        # What nam56r asks for: moe_act is for grouped experts only.
        "experts grouped, selective recomputation": ("every letter", (*every, TE, GROUPED, AGAIN)),
        "attention and MLP": ("grouped-query attention and MLPs", (*plain, TE)),
    }
    found = on_the_double(trained, 1, [overrides for _, overrides in variants.values()])[0]
    return {name: (model, one) for (name, (model, _)), one in zip(variants.items(), found, strict=True)}


@pytest.mark.parametrize(
    "variant", ["one expert at a time", "experts grouped, selective recomputation", "attention and MLP"]
)
def test_the_same_weights_train_the_same(by_torch, by_te, variant):
    model, ours = by_te[variant]
    theirs = by_torch[model]
    assert len(ours.steps) == STEPS
    for step, wanted in zip(ours.steps, theirs.steps, strict=True):
        assert step.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
        assert step.others == pytest.approx(wanted.others, rel=1e-5)
    assert ours.parameters.keys() == theirs.parameters.keys()
    for name, wanted in theirs.parameters.items():
        error = float((ours.parameters[name] - wanted).norm() / wanted.norm())
        assert error < 1e-6, name


# --- structure --------------------------------------------------------------------------------------


def structure() -> dict[str, Any]:
    as_on_hopper()
    every = Training((*MODELS["every letter"], TE, GROUPED, "training.precision=bf16", "training.checkpoint=null"))
    plain = Training((*MODELS["grouped-query attention and MLPs"], TE))
    chosen = {
        **{name: every.chunks[0].decoder.layers[number] for name, number in {"+": 0, "E": 1, "M": 2, "D": 4}.items()},
        **{"R": every.chunks[0].decoder.layers[11], "mtp": every.chunks[0].mtp.layers[0]},
        **{name: plain.chunks[0].decoder.layers[number] for name, number in {"*": 0, "-": 1}.items()},
    }
    return {
        "classes": {name: classes(layer) for name, layer in chosen.items()},
        "norms": [norms_before(layer) for training in (every, plain) for layer in training.chunks[0].decoder.layers],
        "stack": type(every.chunks[0].decoder).__name__,
        "final norm": where(every.chunks[0].decoder.final_norm),
        "fp32": sorted(
            name.split(".", 3)[3]
            for name, parameter in every.chunks[0].named_parameters()
            if parameter.dtype == torch.float32
        ),
        "refused": refused(),
    }


def where(module: Any) -> str:
    package = type(module).__module__.split(".")[0]
    return f"{package.replace('transformer_engine', 'te')}.{type(module).__name__}"


def classes(layer: Any) -> dict[str, str]:
    """Of each module with parameters or with no inside; the experts of one layer once."""
    return {
        name: where(module)
        for name, module in layer.named_modules()
        if name and ("te." in where(module) or type(module).__name__.startswith("TE")) and "mtp_model_layer" not in name
    }


def norms_before(layer: Any) -> int:
    """How many norms of the whole width a layer has, as modules or in a projection."""
    width = layer.config.hidden_size
    norms = (p for name, p in layer.named_parameters() if "norm" in torch_name(name) and "mtp" not in name)
    # M2RNN's own output norm has as many channels as its heads have values: 32 here, not the width.
    return sum(parameter.numel() == width for parameter in norms)


def refused() -> dict[str, str]:
    from megatron.core.transformer.spec_utils import build_module

    from megacpp_stp.model.specs import nam_te_stack_spec

    args = arguments_of(load_recipe("nam56r-tiny", (*MODELS["every letter"], TE)))
    from megatron.training.argument_utils import hybrid_config_from_args

    config = hybrid_config_from_args(args).transformer
    layers = nam_te_stack_spec.submodules

    def said(spec: Any, **changes: Any) -> str:
        for name, value in changes.items():
            setattr(config, name, value)
        try:
            build_module(spec, config, layer_number=1)
        except ValueError as error:
            return str(error).splitlines()[0]
        return "built"

    return {
        "dropout": said(layers.dsa_layer, attention_dropout=0.1),
        "no latent norms": said(layers.mla_layer, qk_layernorm=False),
        "fused down-projections": said(nam_te_stack_spec, mla_down_proj_fusion=True),
        "gated delta net": said(layers.gdn_layer),
    }


@pytest.fixture(scope="module")
def built():
    return on_the_double(structure, 1)[0]


LATENT = {
    "self_attention.linear_q_down_proj": "megatron.TELinear",
    "self_attention.linear_q_up_proj": "megatron.TEColumnParallelLinear",
    "self_attention.linear_kv_down_proj": "megatron.TELinear",
    "self_attention.linear_kv_up_proj": "megatron.TEColumnParallelLinear",
    "self_attention.linear_proj": "megatron.TERowParallelLinear",
    "self_attention.q_layernorm": "te.RMSNorm",
    "self_attention.kv_layernorm": "te.RMSNorm",
    "input_layernorm": "te.RMSNorm",
}
INDEXER = "self_attention.core_attention.indexer"
MIXER = {
    "norm": "te.RMSNorm",
    "mixer.in_proj": "megatron.TEColumnParallelLinear",
    "mixer.out_proj": "megatron.TERowParallelLinear",
}
CLASSES = {
    "*": {
        "self_attention.linear_qkv": "megatron.TELayerNormColumnParallelLinear",
        "self_attention.core_attention": "megatron.TEDotProductAttention",
        "self_attention.linear_proj": "megatron.TERowParallelLinear",
    },
    "-": {
        "mlp.linear_fc1": "megatron.TELayerNormColumnParallelLinear",
        "mlp.linear_fc2": "megatron.TERowParallelLinear",
    },
    "+": {**LATENT, "self_attention.core_attention": "megatron.TEDotProductAttention"},
    "D": {
        **LATENT,
        **{f"{INDEXER}.{name}": "megatron.TELinear" for name in ("linear_wq_b", "linear_wk", "linear_weights_proj")},
        f"{INDEXER}.k_norm": "te.LayerNorm",
    },
    "E": {
        "pre_mlp_layernorm": "te.RMSNorm",
        "mlp.experts": "megatron.TEGroupedMLP",
        "mlp.experts.linear_fc1": "megatron.TEColumnParallelGroupedLinear",
        "mlp.experts.linear_fc2": "megatron.TERowParallelGroupedLinear",
        "mlp.shared_experts.linear_fc1": "megatron.TEColumnParallelLinear",
        "mlp.shared_experts.linear_fc2": "megatron.TERowParallelLinear",
    },
    "M": MIXER,
    "R": MIXER,
    "mtp": {
        "enorm": "te.RMSNorm",
        "hnorm": "te.RMSNorm",
        "eh_proj": "megatron.TEColumnParallelLinear",
        "final_layernorm": "te.RMSNorm",
    },
}


@pytest.mark.parametrize("letter", CLASSES)
def test_which_class_is_in_which_place(built, letter):
    assert built["classes"][letter] == CLASSES[letter]


def test_every_layer_has_one_norm_before_its_mixer(built):
    assert len(built["norms"]) > 20
    assert set(built["norms"]) == {1}
    assert (built["stack"], built["final norm"]) == ("TeStack", "te.RMSNorm")


def test_fp32_parameters_stay_fp32_in_a_model_of_16_bits(built):
    mamba3 = [f"mixer.{name}" for name in ("dt_bias", "B_bias", "C_bias", "D")]
    m2rnn = ["mixer.A_log", "mixer.dt_bias"]
    assert built["fp32"] == sorted(3 * mamba3 + m2rnn)


def test_what_the_backend_does_not_compute_is_refused(built):
    assert built["refused"] == {
        "dropout": "--attention-dropout: sparse attention has no dropout (got 0.1)",
        "no latent norms": "--qk-layernorm: MLA without it has no norm on its latents, unlike DeepSeek's (got False)",
        "fused down-projections": "--mla-down-proj-fusion: fusing MLA's down-projections takes another class than the "
        "NAM stack's",
        "gated delta net": "--hybrid-layer-pattern: the gated delta net layer is in neither backend of the NAM stack "
        "(got 'G')",
    }


# --- parameters of the shipped recipes ---------------------------------------------------------------

ONE_RANK = (
    "launch.processes_per_node=1",
    "parallel={tensor: 1, pipeline: 1, virtual: 1, context: 1, expert: 1, sequence_parallel: false, stages: auto}",
    "optimizer.overlap_param_gather=false",
)
LARGE = [name for name in list_recipes() if load_recipe(name).model.backend == "te"]


def recipe_of(name: str) -> Recipe:
    return load_recipe(name, ONE_RANK)


def weights(names: list[str]) -> dict[str, Counter[tuple[str, str]]]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import hybrid_config_from_args

    as_on_hopper()
    found = {}
    for name in names:
        config = hybrid_config_from_args(arguments_of(recipe_of(name)))
        config.transformer.use_cpu_initialization = True
        config.transformer.perform_initialization = False
        with torch.device("meta"):  # shapes and no memory
            model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        found[name] = chunk_weights(model)
    return found


@pytest.fixture(scope="module")
def models():
    return on_the_double(weights, 1, LARGE)[0]


@pytest.mark.parametrize("name", LARGE)
def test_every_weight_of_every_recipe(models, name):
    recipe = recipe_of(name)
    assert named_by_torch(models[name]) == counted(parts(recipe, lowered(recipe)))


CUT = (
    *ALL_LETTERS,
    *("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=2", TE, GROUPED),
    *("parallel.tensor=2", "parallel.sequence_parallel=true"),
)


def cut_weights() -> tuple[Counter[tuple[str, str]], int]:
    from megacpp_stp.model.count import count_parameters

    as_on_hopper()
    (model,) = Training(CUT).chunks
    return chunk_weights(model), sum(count_parameters([model], device=torch.device("cpu")))


def test_weights_cut_over_tensor_parallel_ranks():
    """MLA's down-projections are whole on each rank here, unlike in the torch backend."""
    recipe = load_recipe("nam56r-tiny", CUT)
    planned = parts(recipe, lowered(recipe))
    for found, total in on_the_double(cut_weights, 2, layout=Layout(tensor=2)):
        assert named_by_torch(found) == counted(planned, tensor=2)
        assert total == sum(part.total for part in planned)


def named_by_torch(found: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """As the plan has them: grouped experts together, a norm in a projection under the layer's norm."""
    renamed: Counter[tuple[str, str]] = Counter()
    for (part, weight), elements in found.items():
        renamed[part, torch_name(weight)] += elements
    return as_planned(renamed)


# --- checkpoints ------------------------------------------------------------------------------------


def checkpoint_entries() -> list[dict[str, dict[str, tuple[int, ...]]]]:
    """Tensors in a checkpoint of each model by name, with their whole shapes, by backend."""
    as_on_hopper()
    every, plain = MODELS.values()
    models = [{"torch": every, "te": (*every, TE, GROUPED)}, {"torch": plain, "te": (*plain, TE)}]
    return [{backend: entries(Training(overrides)) for backend, overrides in model.items()} for model in models]


def entries(training: Training) -> dict[str, tuple[int, ...]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = training.chunks[0].sharded_state_dict(metadata={"dp_cp_group": training.groups.dp_cp})
    apply_factories(state)
    return {item.key: tuple(item.global_shape) for item in nested_values(state) if isinstance(item, ShardedTensor)}


def test_checkpoints_of_both_backends_hold_the_same_tensors():
    for model in on_the_double(checkpoint_entries, 1)[0]:
        assert len(model["te"]) > 100
        assert model["te"] == model["torch"]


# --- layer by layer, as the GPU tests do ---------------------------------------------------------------


def layer_errors() -> dict[str, tuple[Errors, Errors]]:
    dtypes = (torch.float32, torch.bfloat16)
    return {kind: tuple(compare(kind, dtype, device="cpu") for dtype in dtypes) for kind in KINDS}


@pytest.fixture(scope="module")
def errors():
    return on_the_double(layer_errors, 1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_equals_the_torch_backends(errors, kind):
    exact, rounded = errors[kind]
    assert len(exact.te) >= 5
    assert max(exact.te.values()) < 2e-6
    assert rounded.te == pytest.approx(rounded.torch, rel=0.05)  # the double rounds where the torch backend does
    assert min(rounded.te.values()) > 1e-4
