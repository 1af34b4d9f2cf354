"""The Mamba-3 mixer on real ranks: alone against the reference, then cut over tensor and sequence parallelism."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megacpp_stp.errors import UserError
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer
from megacpp_stp.model.mamba3.reference import reference_mixer
from megacpp_stp.model.norm import RMSNorm
from tests.parity._gloo import Layout, run_ranks
from tests.parity.mamba3_mixers import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MIMO,
    RANK,
    ROTATIONS,
    STATE,
    WHOLE_ON_EVERY_RANK,
    build_mixer,
    cut,
    each_rotation,
    hidden_and_cotangent,
    load,
    mamba_config,
    mixer_results,
    whole_parameters,
)

LAYOUTS = {
    "one rank": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "tensor and sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


# --- one rank -----------------------------------------------------------------------------------


def one_rank_facts(checkpoint: str) -> dict[str, Any]:
    save(checkpoint)
    save(checkpoint + "-mimo", RANK)
    return {
        "errors": each_rotation(LAYOUTS["one rank"]),
        "groups": {groups: mixer_results(0.5, {}, groups) for groups in (1, 2, 8)},
        "mimo": [mixer_results(0.5, {}, groups, RANK) for groups in (1, GROUPS)],
        "initial": initial_facts(),
        "layer": layer_facts(),
        "bf16": bf16_facts(),
        "refused": refusals(),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tmp_path_factory.mktemp("mamba3") / "checkpoint")


@pytest.fixture(scope="module")
def facts(checkpoint):
    return run_ranks(one_rank_facts, 1, checkpoint)[0]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_mixer_equals_the_reference(facts, rotation):
    errors = facts["errors"][rotation]
    assert len(errors) == 10 + (rotation > 0)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_mixer_with_other_numbers_of_groups_equals_the_reference(facts, groups):
    assert max(facts["groups"][groups].values()) < 1e-5


def test_mixer_with_several_inputs_and_outputs_equals_the_reference(facts):
    for errors in facts["mimo"]:
        assert len(errors) == 11 + len(MIMO)
        assert max(errors.values()) < 1e-5, errors


def initial_facts() -> dict[str, Any]:
    torch.manual_seed(5)
    several = build_mixer(mamba_config(params_dtype=torch.bfloat16), rope_fraction=0.5, mimo_rank=RANK)
    mixer = build_mixer(mamba_config(mamba_num_heads=512, params_dtype=torch.bfloat16), rope_fraction=0.5)
    parameters = dict(mixer.named_parameters())
    return {
        "shapes": {name: tuple(p.shape) for name, p in parameters.items()},
        "dtypes": {name: p.dtype for name, p in parameters.items()},
        "dt": torch.nn.functional.softplus(mixer.dt_bias.detach()),
        "ones": {name for name, p in parameters.items() if bool((p == 1).all())},
        "deviations": {name: float(p.float().std()) for name, p in parameters.items() if "proj" in name},
        "cut": {name for name, p in parameters.items() if getattr(p, "tensor_model_parallel", False)},
        "parts": mixer.in_proj.weight.partition_sizes,
        "fp32": mixer.fp32_parameters,
        "mimo": {
            name: (p.dtype, p.unique().tolist()) for name, p in several.bfloat16().named_parameters() if name in MIMO
        },
    }


def test_parameters_and_their_initial_values(facts):
    found = facts["initial"]
    inner = 512 * HEAD_DIM
    assert found["shapes"] == {
        "in_proj.weight": (2 * inner + 2 * GROUPS * STATE + 3 * 512, HIDDEN),
        "out_proj.weight": (HIDDEN, inner),
        "dt_bias": (512,),
        "B_bias": (512, STATE),
        "C_bias": (512, STATE),
        "D": (512,),
        "B_norm.weight": (STATE,),
        "C_norm.weight": (STATE,),
        "angle_proj.weight": (STATE // 4, HIDDEN),
    }
    fp32 = {name for name, dtype in found["dtypes"].items() if dtype == torch.float32}
    assert fp32 == set(found["fp32"]) == {"dt_bias", "B_bias", "C_bias", "D"}
    assert found["ones"] == {"B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight"}
    assert found["mimo"] == {
        "mimo_x": (torch.float32, pytest.approx([1 / RANK])),
        "mimo_z": (torch.float32, [1.0]),
        "mimo_o": (torch.float32, pytest.approx([1 / RANK])),
    }
    assert found["cut"] == found["shapes"].keys() - WHOLE_ON_EVERY_RANK
    assert sum(found["parts"]) == found["shapes"]["in_proj.weight"][0]
    # Log-uniform in [0.001, 0.1]: the ends are reached, and the median is 0.01.
    dt = found["dt"]
    assert 0.001 * 0.999 < float(dt.min()) < 0.0011
    assert 0.09 < float(dt.max()) < 0.1 * 1.001
    assert float(dt.median()) == pytest.approx(0.01, rel=0.3)
    # Megatron's: 0.02, and 0.02 / sqrt(layers of a hybrid model) into the residual stream; six layers here.
    assert found["deviations"]["in_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert found["deviations"]["angle_proj.weight"] == pytest.approx(0.02, rel=0.3)
    assert found["deviations"]["out_proj.weight"] == pytest.approx(0.02 / 6**0.5, rel=0.05)


def layer_facts() -> dict[str, Any]:
    """Hosted in upstream's MambaLayer, as the stack builds it."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = mamba_config()
    spec = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm,
            mixer=ModuleSpec(module=Mamba3Mixer, params={"chunk_size": 8, "rope_fraction": 0.5}),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    layer = build_module(
        spec,
        config=config,
        layer_number=3,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        pp_layer_offset=0,
        name="decoder.layers.2",
    )
    hidden, _ = hidden_and_cotangent()
    out = layer(hidden, None)
    parameters = {name: p.detach() for name, p in layer.mixer.named_parameters()}
    mixed = reference_mixer(layer.norm(hidden), parameters, heads=HEADS, groups=GROUPS)
    return {"difference": float((out - hidden - mixed).abs().max()), "largest": float(mixed.abs().max())}


def test_a_mamba_layer_hosts_the_mixer_after_its_norm(facts):
    assert facts["layer"]["difference"] < 1e-5 * max(1.0, facts["layer"]["largest"])
    assert facts["layer"]["largest"] > 1e-3


def bf16_facts() -> dict[str, Any]:
    """Relative errors to the reference on the same bf16 values, before and after a cast of the whole mixer."""
    found = {}
    for cast_all in (False, True):
        mixer = build_mixer(mamba_config(params_dtype=torch.bfloat16, bf16=True), chunk_size=4, rope_fraction=0.5)
        load(mixer, whole_parameters(rotation=0.5))
        if cast_all:
            mixer.bfloat16()
        hidden, _ = hidden_and_cotangent(torch.bfloat16)
        out, _ = mixer(hidden)
        out.float().sum().backward()
        values = {name: p.detach().double() for name, p in mixer.named_parameters()}
        wanted = reference_mixer(hidden.double(), values, heads=HEADS, groups=GROUPS)
        found[cast_all] = {
            "dtype": out.dtype,
            "error": float((out.double() - wanted).norm() / wanted.norm()),
            "gradients": {name: p.grad.dtype == p.dtype for name, p in mixer.named_parameters()},
            "fp32": {name for name, p in mixer.named_parameters() if p.dtype == torch.float32},
        }
    return found


@pytest.mark.parametrize("cast_all", [False, True])
def test_bf16_activations_with_fp32_parameters(facts, cast_all):
    found = facts["bf16"][cast_all]
    assert found["fp32"] == {"dt_bias", "B_bias", "C_bias", "D"}
    assert found["dtype"] == torch.bfloat16
    # Five roundings to bf16 lie between input and output.
    assert found["error"] < 5 * 2**-9
    assert all(found["gradients"].values())


# --- what it refuses ----------------------------------------------------------------------------


def refusal(build: Any) -> str:
    try:
        build()
    except UserError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    configs = {
        "no heads": {"mamba_num_heads": None},
        "no state": {"mamba_state_dim": 0},
        "groups and heads": {"mamba_num_heads": 6},
        "state dtype": {"mamba_training_ssm_states_dtype": torch.bfloat16},
    }
    found = {
        name: refusal(lambda changes=changes: build_mixer(mamba_config(**changes))) for name, changes in configs.items()
    }
    found["rotation"] = refusal(lambda: build_mixer(mamba_config(), rope_fraction=0.25))
    found["pairs"] = refusal(lambda: build_mixer(mamba_config(mamba_state_dim=2), rope_fraction=0.5))
    found["chunk"] = refusal(lambda: build_mixer(mamba_config(), chunk_size=0))
    found["inputs"] = refusal(lambda: build_mixer(mamba_config(), mimo_rank=0))
    mixer, hidden = build_mixer(mamba_config()), hidden_and_cotangent()[0]
    found["inference"] = refusal(lambda: mixer(hidden, inference_context=object()))
    found["packed"] = refusal(lambda: mixer(hidden, packed_seq_params=object()))
    found["cache"] = refusal(mixer.mamba_state_shapes_per_request)
    return found


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no heads", "--mamba-num-heads"),
        ("no state", "--mamba-state-dim"),
        ("groups and heads", "4 groups, 6 heads"),
        ("state dtype", "--mamba-training-ssm-states-dtype"),
        ("rotation", "rope_fraction"),
        ("pairs", "too few state channels"),
        ("chunk", "chunk_size"),
        ("inputs", "mimo_rank"),
        ("inference", "no inference"),
        ("packed", "no packed sequences"),
        ("cache", "no inference"),
    ],
)
def test_refused_on_one_rank(facts, case, says):
    assert says in facts["refused"][case]


def context_refusal() -> str:
    return refusal(lambda: build_mixer(mamba_config(context_parallel_size=2)))


def test_context_parallelism_is_refused():
    for says in run_ranks(context_refusal, 2, layout=Layout(context=2)):
        assert "--context-parallel-size" in says


# --- two tensor-parallel ranks ------------------------------------------------------------------


def two_rank_facts(checkpoint: str) -> dict[str, Any]:
    changes = {"tensor_model_parallel_size": 2}
    torch.manual_seed(5)
    mixer = build_mixer(mamba_config(**changes), rope_fraction=0.5)
    return {
        "errors": {name: each_rotation(LAYOUTS[name]) for name in ("tensor", "tensor and sequence")},
        "mimo": [mixer_results(0.5, LAYOUTS[name], rank=RANK) for name in ("tensor", "tensor and sequence")],
        "loaded": load_cut(checkpoint),
        "loaded mimo": load_cut(checkpoint + "-mimo", RANK),
        "refused": refusal(lambda: build_mixer(mamba_config(mamba_num_groups=1, **changes))),
        "initial": {name: p.detach().clone() for name, p in mixer.named_parameters()},
    }


@pytest.fixture(scope="module")
def two_ranks(facts, checkpoint):
    return run_ranks(two_rank_facts, 2, checkpoint, layout=Layout(tensor=2))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("layout", ["tensor", "tensor and sequence"])
def test_cut_mixer_equals_the_reference(two_ranks, layout, rotation):
    for rank in two_ranks:
        errors = rank["errors"][layout][rotation]
        assert len(errors) == 10 + (rotation > 0)
        assert max(errors.values()) < 1e-5, errors


def test_cut_mixer_with_several_inputs_and_outputs_equals_the_reference(two_ranks):
    for rank in two_ranks:
        for errors in rank["mimo"]:
            assert len(errors) == 11 + len(MIMO)
            assert max(errors.values()) < 1e-5, errors


def test_groups_that_the_ranks_do_not_divide_are_refused(two_ranks):
    for rank in two_ranks:
        assert "1 groups, 2 ranks" in rank["refused"]


def test_ranks_start_alike_where_they_are_alike_and_apart_where_they_are_not(two_ranks):
    one, other = (rank["initial"] for rank in two_ranks)
    for name in WHOLE_ON_EVERY_RANK:
        assert torch.equal(one[name], other[name]), name
    for name in ("dt_bias", "in_proj.weight", "out_proj.weight"):
        assert not torch.equal(one[name], other[name]), name


# --- checkpoints --------------------------------------------------------------------------------


def save(directory: str, rank: int = 1) -> None:
    from megatron.core import dist_checkpointing

    mixer = build_mixer(mamba_config(), rope_fraction=0.5, mimo_rank=rank)
    load(mixer, whole_parameters(rotation=0.5, rank=rank), rank=rank)
    Path(directory).mkdir()
    # The writer starts a process of its own, which a daemon may not.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    dist_checkpointing.save(mixer.sharded_state_dict(prefix="mixer."), directory)


def load_cut(directory: str, rank: int = 1) -> dict[str, bool]:
    """For each parameter, whether what came back is this rank's part of the whole."""
    from megatron.core import dist_checkpointing

    mixer = build_mixer(mamba_config(tensor_model_parallel_size=2), rope_fraction=0.5, mimo_rank=rank)
    loaded = dist_checkpointing.load(mixer.sharded_state_dict(prefix="mixer."), directory)
    mixer.load_state_dict({name.removeprefix("mixer."): value for name, value in loaded.items()}, strict=True)
    whole = whole_parameters(rotation=0.5, rank=rank)
    return {name: torch.equal(p, cut(name, whole[name], rank_of_mimo=rank)) for name, p in mixer.named_parameters()}


def test_a_checkpoint_of_one_rank_loads_on_two(two_ranks):
    for rank in two_ranks:
        assert rank["loaded"] == dict.fromkeys(whole_parameters(rotation=0.5), True)
        assert rank["loaded mimo"] == dict.fromkeys(whole_parameters(rotation=0.5, rank=RANK), True)
