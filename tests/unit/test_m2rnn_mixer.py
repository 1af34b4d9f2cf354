"""The M2RNN layer on one rank: against plain formulas, its first values, precision, memory, and what it refuses.

Legend: s sequence, b batch, h hidden, H heads, K key channels and V value channels of a head, c taps.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.m2rnn.reference import (
    reference_causal_conv,
    reference_gated_norm,
    reference_log_forget,
    reference_scan,
)
from megacpp_stp.model.norm import RMSNorm
from tests.parity._gloo import run_ranks
from tests.unit.test_m2rnn_scan import kept_bytes
from tests.unit.test_model_torch_backend import make_config

SEQUENCE, BATCH, HIDDEN, HEADS, KEY, VALUE, TAPS = 14, 2, 32, 4, 6, 3, 4
# Of the whole model, part by part in the order of the rows.
PROJECTED = {"q": KEY, "k": KEY, "v": HEADS * VALUE, "f": HEADS, "g": HEADS * VALUE}
CONVOLVED = {part: PROJECTED[part] for part in "qkv"}
SHAPES = {
    "norm.weight": (HIDDEN,),
    "mixer.in_proj.weight": (sum(PROJECTED.values()), HIDDEN),
    "mixer.conv_weight": (sum(CONVOLVED.values()), 1, TAPS),
    "mixer.conv_bias": (sum(CONVOLVED.values()),),
    "mixer.state_weight": (HEADS, VALUE, VALUE),
    "mixer.A_log": (HEADS,),
    "mixer.dt_bias": (HEADS,),
    "mixer.D": (HEADS * VALUE,),
    "mixer.norm_weight": (HEADS * VALUE,),
    "mixer.out_proj.weight": (HIDDEN, HEADS * VALUE),
}
PARTS = {"mixer.in_proj.weight": PROJECTED, "mixer.conv_weight": CONVOLVED, "mixer.conv_bias": CONVOLVED}
SIZES = {"num_heads": HEADS, "key_dim": KEY, "value_dim": VALUE, "conv_kernel": TAPS, "checkpoint_every": 4}


def build_layer(sizes: dict[str, Any] | None = None, *, module: type = M2RNNMixer, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    spec = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm,
            mixer=ModuleSpec(
                module=module,
                params={**SIZES, **(sizes or {})},
                submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=make_config(**changes), layer_number=1, pg_collection=groups)


def whole_weights() -> dict[str, Any]:
    """Every weight of the layer, from its name alone; no gate, norm or identity stays at its first value."""
    weights = {}
    for name, shape in SHAPES.items():
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        scale = {"mixer.in_proj.weight": 0.4, "mixer.conv_weight": 0.6, "mixer.A_log": 0.5}.get(name, 0.3)
        center = 1.0 if name in ("norm.weight", "mixer.D", "mixer.norm_weight") else 0.0
        weights[name] = center + scale * noise
    return weights


def batch() -> tuple[Any, Any]:
    """Hidden states, and what each number of the layer's output counts in the loss: both [s, b, h]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator).unbind()


def reference_layer(x: Any, weights: dict[str, Any], eps: float) -> Any:
    """The whole layer as its formulas read."""
    w = {name.removeprefix("mixer."): weight for name, weight in weights.items()}
    normed = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weights["norm.weight"]
    split = (normed @ w["in_proj.weight"].t()).split(list(PROJECTED.values()), dim=-1)
    convolved = reference_causal_conv(torch.cat(split[:3], dim=-1), w["conv_weight"], w["conv_bias"])
    query, key, value = convolved.split(list(CONVOLVED.values()), dim=-1)
    log_forget = reference_log_forget(split[3], w["A_log"], w["dt_bias"])
    y, _ = reference_scan(query, key, value.unflatten(-1, (HEADS, VALUE)), log_forget, w["state_weight"])
    normed = reference_gated_norm(y.flatten(-2), value, split[4], w["D"], w["norm_weight"], eps=eps)
    return x + normed @ w["out_proj.weight"].t()


def set_weights(layer: Any, weights: dict[str, Any]) -> None:
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            assert parameters[name].shape == value.shape, name
            parameters[name].copy_(value)


def one_rank_facts() -> dict[str, Any]:
    """Everything, in one process with Megatron's groups."""
    return {
        "reference": against_reference(),
        "16 bits": in_16_bits(),
        "kept": [kept_of_mixer(s) for s in (64, 257)],
        "start": first_values({}),
        "extreme": lowest_decay(),
        "refused": refusals(),
    }


@pytest.fixture(scope="module")
def facts():
    return run_ranks(one_rank_facts, 1)[0]


def relative_error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def against_reference() -> dict[str, tuple[Any, Any]]:
    """Output and gradients of the layer and of the formulas, in fp64."""
    layer = build_layer(params_dtype=torch.float64, layernorm_epsilon=0.05).double()
    weights = {name: weight.double().requires_grad_() for name, weight in whole_weights().items()}
    set_weights(layer, weights)
    x, counts = (t.double() for t in batch())
    x.requires_grad_()
    found = []
    for out, parameters in (
        (layer(x), dict(layer.named_parameters())),
        (reference_layer(x, weights, eps=0.05), weights),
    ):
        names = ["input", *weights]
        grads = torch.autograd.grad((out * counts).sum(), [x, *(parameters[name] for name in weights)])
        found.append({"output": out.detach(), **dict(zip(names, grads, strict=True))})
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def test_the_layer_equals_its_formulas_in_fp64_with_every_gradient(facts):
    assert facts["reference"].keys() == {"output", "input", *SHAPES}
    for name, (ours, theirs) in facts["reference"].items():
        assert float(theirs.abs().max()) > 1e-3, name
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=name)


# --- first values ------------------------------------------------------------------------------------


def first_values(changes: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(3)
    layer = build_layer(**changes)
    marks = ("tensor_model_parallel", "partition_dim", "partition_sizes")
    return {
        "values": {name: parameter.detach().clone() for name, parameter in layer.named_parameters()},
        "marks": {
            name: {mark: getattr(parameter, mark, None) for mark in marks}
            for name, parameter in layer.named_parameters()
        },
    }


def lowest_decay() -> Any:
    """A_log when every draw is the lowest that there is, and when every draw is the highest."""

    class Lowest(M2RNNMixer):
        draw = 0.0

        def _uniform(self, rows: int, *shape: int) -> Any:
            return torch.full((rows, *shape), self.draw)

    class Highest(Lowest):
        draw = 1 - 2**-24

    return [build_layer(module=mixer).mixer.A_log.detach() for mixer in (Lowest, Highest)]


def test_no_draw_gives_a_decay_without_a_logarithm(facts):
    for a_log in facts["extreme"]:
        assert torch.isfinite(a_log).all()


def test_the_first_values_are_those_of_the_authors(facts):
    values = facts["start"]["values"]
    assert {name: tuple(value.shape) for name, value in values.items()} == SHAPES
    a, dt = values["mixer.A_log"].exp(), torch.nn.functional.softplus(values["mixer.dt_bias"])
    assert 0 < float(a.min()) < float(a.max()) <= 16
    assert 1e-3 <= float(dt.min()) < float(dt.max()) <= 0.1
    assert torch.equal(values["mixer.state_weight"], torch.eye(VALUE).expand(HEADS, -1, -1))
    for name in ("mixer.D", "mixer.norm_weight", "norm.weight"):
        assert torch.equal(values[name], torch.ones(SHAPES[name]))
    for name in ("mixer.conv_weight", "mixer.conv_bias"):
        assert 0.3 < float(values[name].abs().max()) <= 1 / math.sqrt(TAPS)


# --- precision and memory ----------------------------------------------------------------------------


def in_16_bits() -> dict[str, Any]:
    from megatron.core.transformer.module import Float16Module

    layer = build_layer(params_dtype=torch.bfloat16, bf16=True)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    weights = whole_weights()
    set_weights(layer, weights)
    rounded = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    x = batch()[0].bfloat16()
    out = layer(x)
    wrapped = Float16Module(layer.config, layer)
    return {
        "dtypes": dtypes,
        "dtype": out.dtype,
        "error": relative_error(out.double() - x.double(), reference_layer(x.double(), rounded, eps=1e-5) - x.double()),
        "wrapped": {name.removeprefix("module."): p.dtype for name, p in wrapped.named_parameters()},
    }


def test_in_16_bits_the_decay_stays_fp32_through_the_wrapper(facts):
    found = facts["16 bits"]
    kept = {"mixer.A_log", "mixer.dt_bias"}
    expected = {name: torch.float32 if name in kept else torch.bfloat16 for name in SHAPES}
    assert found["dtypes"] == found["wrapped"] == expected
    assert found["dtype"] == torch.bfloat16
    assert found["error"] < 2e-2


def kept_of_mixer(s: int, **changes: Any) -> tuple[int, int]:
    """Bytes that autograd keeps of the mixer on this rank in bf16, found and expected."""
    ranks, shards = changes.get("tensor_model_parallel_size", 1), 1
    if changes.get("sequence_parallel"):
        shards = ranks
    sizes = {"num_heads": 8, "key_dim": 16, "value_dim": 8, "checkpoint_every": 32}
    mixer = build_layer(sizes, params_dtype=torch.bfloat16, **changes).mixer
    x = torch.randn(s // shards, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    found = kept_bytes(lambda: mixer(x)[0], apart=list(mixer.parameters()))
    heads, keys = 8 // ranks, 16
    values, shared = heads * 8, 2 * keys // ranks
    activations = 2 * (HIDDEN // shards + (shared + 2 * values + heads) + 2 * (shared + values) + 2 * values)
    if ranks > 1:
        activations += 2 * 2 * keys
    states = (s - 1) // 32 * BATCH * heads * keys * 8 * 4
    # What the convolution computes past the end, and exp(A_log).
    rest = BATCH * (shared + values) * (TAPS - 1) * 2 + heads * 4
    return found, s * BATCH * (activations + 16 * heads + 4) + states + rest


def test_the_mixer_keeps_each_activation_once_and_a_state_a_segment(facts):
    """Four fp32 numbers a head for the gate, one a token for the norm; on a GPU logsigmoid keeps one less."""
    for found, expected in facts["kept"]:
        assert found == expected


# --- refused -----------------------------------------------------------------------------------------


def refusal(action: Any) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "done"


def refusals() -> dict[str, str]:
    layer = build_layer()
    x = batch()[0]
    return {
        "context": refusal(lambda: build_layer(context_parallel_size=2)),
        "size": refusal(lambda: build_layer({"value_dim": 0})),
        "packed": refusal(lambda: layer(x, packed_seq_params=object())),
        "inference": refusal(lambda: layer(x, inference_context=object())),
        "state": refusal(layer.mamba_state_shapes_per_request),
        "heads": "none" if "num_heads" not in str(missing_heads()) else "asked for",
    }


def missing_heads() -> Exception | None:
    try:
        M2RNNMixer(make_config(), MambaMixerSubmodules(), HIDDEN, key_dim=KEY, value_dim=VALUE, conv_kernel=TAPS)
    except TypeError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("context", "--context-parallel-size: M2RNN has no context parallelism"),
        ("size", "value_dim: must be at least 1 (got 0)"),
        ("packed", "M2RNN has no packed sequences"),
        ("inference", "inference_context: M2RNN has no inference"),
        ("state", "M2RNN has no inference"),
        ("heads", "asked for"),
    ],
)
def test_what_it_cannot_do_is_refused(facts, case, message):
    assert facts["refused"][case].startswith(message)
