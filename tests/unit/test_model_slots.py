"""Which mixer a Mamba slot holds, and what is refused."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from megacpp_stp.errors import UserError
from megacpp_stp.model import slots as module
from megacpp_stp.model.m2rnn.kernels import xma_m2rnn_scan
from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.mamba3.kernels import mamba_ssm_scan
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer
from megacpp_stp.model.norm import RMSNorm
from megacpp_stp.model.slots import SlotLayer, SlotModules, Slots, add_slot_arguments
from megacpp_stp.model.specs import nam_te_stack_spec, nam_torch_stack_spec, te_stack_spec, torch_stack_spec


class NormedLinear(ColumnParallelLinear):
    """Stands for a projection with the norm in it."""


PATTERN = "+EM|EM-/+E"  # slots 3 and 5
TORCH = SlotModules(norm=RMSNorm, in_proj=ColumnParallelLinear, out_proj=RowParallelLinear, normed_in_proj=None)
FUSED = SlotModules(norm=RMSNorm, in_proj=ColumnParallelLinear, out_proj=RowParallelLinear, normed_in_proj=NormedLinear)
SIZES = {"chunk-size": ("mamba3", 16), "heads": ("m2rnn", 2), "key-dim": ("m2rnn", 8), "value-dim": ("m2rnn", 4)}
SIZES |= {"conv-kernel": ("m2rnn", 3), "checkpoint-every": ("m2rnn", 32), "mimo-rank": ("mamba3", 2)}
SCANS = {"mamba3": "mamba-ssm", "m2rnn": "xma"}


def parsed(*argv: str, pattern: str = PATTERN, without: str = "") -> Namespace:
    tokens = [*argv]
    for name, (mixer, value) in SIZES.items():
        if name != without:
            tokens += [f"--nam-{mixer}-{name}", str(value)]
    for mixer, kernel in SCANS.items():
        if without != f"{mixer} kernel":
            tokens += [f"--nam-{mixer}-kernel", kernel]
    args = add_slot_arguments(ArgumentParser()).parse_args(tokens)
    args.hybrid_layer_pattern = pattern
    return args


def slots(mamba3: str = "3", m2rnn: str = "5", **changes: str) -> Slots:
    return Slots.from_arguments(parsed("--nam-mamba3-layers", mamba3, "--nam-recurrent-layers", m2rnn, **changes))


def test_each_slot_gets_the_mixer_that_its_number_asks_for():
    layers = [slots().spec(number, TORCH) for number in (3, 5)]
    first, second = (layer.submodules.mixer for layer in layers)
    assert (first.module, second.module) == (Mamba3Mixer, M2RNNMixer)
    for layer in layers:
        assert layer.module is MambaLayer
        assert layer.submodules.norm is RMSNorm
        projections = layer.submodules.mixer.submodules
        assert (projections.in_proj, projections.out_proj) == (ColumnParallelLinear, RowParallelLinear)
    assert first.params == {"chunk_size": 16, "rope_fraction": 0.0, "mimo_rank": 2, "scan": mamba_ssm_scan}
    assert second.params == {
        "num_heads": 2,
        "key_dim": 8,
        "value_dim": 4,
        "conv_kernel": 3,
        "checkpoint_every": 32,
        "scan": xma_m2rnn_scan,
    }


def test_the_complex_form_rotates_half_of_the_state():
    args = parsed("--nam-mamba3-layers", "3,5", "--nam-mamba3-complex-rotation")
    found = Slots.from_arguments(args)
    assert found.spec(5, TORCH).submodules.mixer.params["rope_fraction"] == 0.5
    assert not found.m2rnn


def test_the_norm_of_mamba2_is_in_its_projection_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(module, "HAVE_MAMBA_SSM", True)
    found = Slots.from_arguments(parsed("--nam-mamba2-layers", "3", "--nam-recurrent-layers", "5"))
    layer, other = (found.spec(number, FUSED).submodules for number in (3, 5))
    assert (layer.norm, layer.mixer.module, layer.mixer.params) == (IdentityOp, MambaMixer, {})
    assert layer.mixer.submodules.in_proj is NormedLinear
    assert (other.norm, other.mixer.submodules.in_proj) == (RMSNorm, ColumnParallelLinear)


@pytest.mark.parametrize(
    ("modules", "message"), [(TORCH, "not in this backend"), (FUSED, "needs mamba-ssm, which is not installed")]
)
def test_mamba2_where_it_cannot_run_is_refused(monkeypatch, modules, message):
    monkeypatch.setattr(module, "HAVE_MAMBA_SSM", modules is TORCH)
    found = Slots.from_arguments(parsed("--nam-mamba2-layers", "3,5"))
    with pytest.raises(UserError, match=message) as caught:
        found.spec(3, modules)
    assert caught.value.field == "--nam-mamba2-layers"


def test_a_slot_in_no_list_is_named():
    found = Slots.from_arguments(parsed("--nam-recurrent-layers", "3"))
    with pytest.raises(UserError, match="layer 5 is a Mamba slot and in no list") as caught:
        found.spec(5, TORCH)
    assert caught.value.field == "--nam-mamba3-layers, --nam-recurrent-layers, --nam-mamba2-layers"
    assert caught.value.fix == "name layer 5 in one of them"


@pytest.mark.parametrize("more", [("--nam-recurrent-layers", "3,5"), ("--nam-mamba2-layers", "3")])
def test_a_slot_in_two_lists_is_named(more):
    found = Slots.from_arguments(parsed("--nam-mamba3-layers", "3,5", *more))
    with pytest.raises(UserError, match="layer 3 is a Mamba slot and in 2 lists"):
        found.spec(3, TORCH)


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"mamba3": "2,3"}, "--nam-mamba3-layers", "layer 2 is 'E' in the pattern, not a Mamba slot"),
        ({"m2rnn": "6"}, "--nam-recurrent-layers", "layer 6 is '-' in the pattern, not a Mamba slot"),
        ({"m2rnn": "7"}, "--nam-recurrent-layers", "layer 7 is not in the pattern, not a Mamba slot"),
        ({"m2rnn": "0"}, "--nam-recurrent-layers", "layer 0 is not in the pattern, not a Mamba slot"),
        ({"without": "heads"}, "--nam-m2rnn-heads", "is needed by the layers that are listed"),
        ({"without": "chunk-size"}, "--nam-mamba3-chunk-size", "is needed by the layers that are listed"),
        ({"without": "mamba3 kernel"}, "--nam-mamba3-kernel", "is needed by the layers that are listed"),
        ({"without": "m2rnn kernel"}, "--nam-m2rnn-kernel", "is needed by the layers that are listed"),
    ],
)
def test_lists_that_do_not_fit_are_refused(changes, option, message):
    with pytest.raises(UserError, match=message) as caught:
        slots(**changes)
    assert caught.value.field == option


def test_sizes_of_a_mixer_that_no_layer_has_are_not_needed():
    found = Slots.from_arguments(parsed("--nam-mamba3-layers", "3,5", without="heads"))
    assert found.m2rnn_options == {}


def test_arguments_without_ours_say_how_to_parse_them():
    with pytest.raises(UserError, match="nothing says which mixer") as caught:
        Slots.from_arguments(Namespace(hybrid_layer_pattern=PATTERN))
    assert "add_slot_arguments" in caught.value.fix


def test_without_any_parsed_arguments_a_slot_says_the_same():
    with pytest.raises(UserError, match="nothing says which mixer"):
        SlotLayer(None, modules=TORCH, layer_number=3, name="decoder.layers.2")


@pytest.mark.parametrize("name", ["mtp.layers.0.mtp_model_layer.layers.2", None])
def test_a_slot_in_multi_token_prediction_is_refused(name):
    """Its number, 3, is that of a slot in the decoder."""
    with pytest.raises(UserError, match="cannot be in multi-token prediction"):
        SlotLayer(None, modules=TORCH, slots=slots(), layer_number=3, name=name)


@pytest.mark.parametrize(
    ("spec", "shared"), [(torch_stack_spec, nam_torch_stack_spec), (te_stack_spec, nam_te_stack_spec)]
)
def test_a_spec_with_slots_differs_in_its_mamba_layer_alone(spec, shared):
    chosen = slots()
    ours = spec(chosen)
    assert (ours.module, ours.params) == (shared.module, shared.params)
    assert ours.submodules.mamba_layer.params == {**shared.submodules.mamba_layer.params, "slots": chosen}
    assert "slots" not in shared.submodules.mamba_layer.params
    others = [{**vars(layers.submodules), "mamba_layer": None} for layers in (ours, shared)]
    assert others[0] == others[1]
