"""When a tap reads: in a training forward, for the microbatch that the schedule named, without drawing numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.taps import StpTaps

LAYER = 2
OPEN, CLOSED = 0, 1  # first iteration with the gradient


class Stack(torch.nn.Module):
    """A stage of one linear layer; like a TransformerLayer it returns a pair when told to."""

    def __init__(self, *, pair=False):
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=None, cuda_graph_impl="none")
        layer = Pair(4, 4) if pair else torch.nn.Linear(4, 4)
        layer.layer_number, layer.current_microbatch = LAYER, 0
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, hidden):
        return self.layers[0](hidden)


class Pair(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden), "context"


def tapped(stack, *, start_step=OPEN):
    config = StpConfig(weight=1.0, n_spans=3, start_step=start_step, taps=(LAYER,), seed=5)
    taps = StpTaps(config, iteration=lambda: 0, data_rank=0)
    taps.scale.set(torch.ones(1))
    taps.attach(stack)
    return taps


def readings(taps):
    return taps.meter.reduce(device=torch.device("cpu"), groups=[]).readings_by_tap[LAYER]


def states():
    return torch.randn(8, 2, 4)


def is_seamed(hidden):
    return "Seam" in type(hidden.grad_fn).__name__


def test_a_training_forward_is_read_and_gets_the_gradient():
    """What the tests of silence below rely on."""
    stack = Stack()
    taps = tapped(stack)
    assert is_seamed(stack(states()))
    assert readings(taps) == 1


@pytest.mark.parametrize("start_step", [OPEN, CLOSED], ids=["gate open", "gate closed"])
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_evaluation_reads_nothing_and_needs_no_microbatch(how, start_step):
    stack = Stack()
    taps = tapped(stack, start_step=start_step)
    del stack.layers[0].current_microbatch
    hidden = states()
    if how == "eval":
        stack.eval()
        output = stack(hidden)
        assert output.requires_grad  # autograd is on: the mode alone keeps the tap silent
        assert not is_seamed(output)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            output = stack(hidden)
    assert torch.equal(output, torch.nn.functional.linear(hidden, stack.layers[0].weight, stack.layers[0].bias))
    assert readings(taps) == 0


@pytest.mark.parametrize("microbatch", ["missing", None])
@pytest.mark.parametrize("start_step", [OPEN, CLOSED], ids=["gate open", "gate closed"])
def test_a_layer_whose_microbatch_nobody_named_is_an_error(microbatch, start_step):
    stack = Stack()
    tapped(stack, start_step=start_step)
    if microbatch is None:
        stack.layers[0].current_microbatch = None
    else:
        del stack.layers[0].current_microbatch
    with pytest.raises(UserError, match=f"which microbatch layer {LAYER} is running"):
        stack(states())


def test_of_a_pair_the_states_are_tapped_and_the_rest_is_passed_on():
    stack = Stack(pair=True)
    taps = tapped(stack)
    hidden, context = stack(states())
    assert is_seamed(hidden)
    assert context == "context"
    assert readings(taps) == 1


@pytest.mark.parametrize("start_step", [OPEN, CLOSED], ids=["gate open", "gate closed"])
def test_reading_draws_no_number_from_torch(start_step):
    """tests/parity/test_stp_training.py proves it for Megatron's streams, in a run of its schedule."""
    stack, hidden = Stack(), states()
    taps = tapped(stack, start_step=start_step)
    before = torch.get_rng_state()
    stack(hidden).sum().backward()
    assert readings(taps) == 1
    assert torch.equal(torch.get_rng_state(), before)
