"""Which mixer a Mamba slot holds, and what is refused."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn.mixer import M2RNNMixer
from megacpp_stp.model.mamba3.mixer import Mamba3Mixer
from megacpp_stp.model.slots import SlotMixer, Slots, add_slot_arguments
from megacpp_stp.model.specs import nam_torch_stack_spec, torch_stack_spec

PATTERN = "+EM|EM-/+E"  # slots 3 and 5
SIZES = {"chunk-size": ("mamba3", 16), "heads": ("m2rnn", 2), "key-dim": ("m2rnn", 8), "value-dim": ("m2rnn", 4)}
SIZES |= {"conv-kernel": ("m2rnn", 3), "checkpoint-every": ("m2rnn", 32)}


def parsed(*argv: str, pattern: str = PATTERN, without: str = "") -> Namespace:
    tokens = [*argv]
    for name, (mixer, value) in SIZES.items():
        if name != without:
            tokens += [f"--nam-{mixer}-{name}", str(value)]
    args = add_slot_arguments(ArgumentParser()).parse_args(tokens)
    args.hybrid_layer_pattern = pattern
    return args


def slots(mamba3: str = "3", m2rnn: str = "5", **changes: str) -> Slots:
    return Slots.from_arguments(parsed("--nam-mamba3-layers", mamba3, "--nam-recurrent-layers", m2rnn, **changes))


def test_each_slot_gets_the_mixer_that_its_number_asks_for():
    first, second = (slots().spec(number) for number in (3, 5))
    assert (first.module, second.module) == (Mamba3Mixer, M2RNNMixer)
    assert first.params == {"chunk_size": 16, "rope_fraction": 0.0}
    assert second.params == {
        "num_heads": 2,
        "key_dim": 8,
        "value_dim": 4,
        "conv_kernel": 3,
        "checkpoint_every": 32,
    }


def test_the_complex_form_rotates_half_of_the_state():
    args = parsed("--nam-mamba3-layers", "3,5", "--nam-mamba3-complex-rotation")
    found = Slots.from_arguments(args)
    assert found.spec(5).params["rope_fraction"] == 0.5
    assert not found.m2rnn


def test_a_slot_in_no_list_is_named():
    found = Slots.from_arguments(parsed("--nam-recurrent-layers", "3"))
    with pytest.raises(UserError, match="layer 5 is a Mamba slot and in neither list") as caught:
        found.spec(5)
    assert caught.value.field == "--nam-mamba3-layers, --nam-recurrent-layers"
    assert caught.value.fix == "name layer 5 in one of them"


def test_a_slot_in_both_lists_is_named():
    with pytest.raises(UserError, match="layer 3 is a Mamba slot and in both lists"):
        slots(m2rnn="3,5").spec(3)


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"mamba3": "2,3"}, "--nam-mamba3-layers", "layer 2 is 'E' in the pattern, not a Mamba slot"),
        ({"m2rnn": "6"}, "--nam-recurrent-layers", "layer 6 is '-' in the pattern, not a Mamba slot"),
        ({"m2rnn": "7"}, "--nam-recurrent-layers", "layer 7 is not in the pattern, not a Mamba slot"),
        ({"m2rnn": "0"}, "--nam-recurrent-layers", "layer 0 is not in the pattern, not a Mamba slot"),
        ({"without": "heads"}, "--nam-m2rnn-heads", "is needed by the layers that are listed"),
        ({"without": "chunk-size"}, "--nam-mamba3-chunk-size", "is needed by the layers that are listed"),
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
        SlotMixer(None, layer_number=3, name="decoder.layers.2.mixer")


@pytest.mark.parametrize("name", ["mtp.layers.0.mtp_model_layer.layers.2.mixer", None])
def test_a_slot_in_multi_token_prediction_is_refused(name):
    """Its number, 3, is that of a slot in the decoder."""
    with pytest.raises(UserError, match="cannot be in multi-token prediction"):
        SlotMixer(None, slots=slots(), layer_number=3, name=name)


def test_a_spec_with_slots_differs_in_its_mamba_layer_alone():
    chosen = slots()
    ours, shared = torch_stack_spec(chosen).submodules, nam_torch_stack_spec.submodules
    assert ours.mamba_layer.submodules.mixer.params == {"slots": chosen}
    assert shared.mamba_layer.submodules.mixer.params == {"slots": None}
    assert (ours.dsa_layer, ours.mtp_block_spec) == (shared.dsa_layer, shared.mtp_block_spec)
