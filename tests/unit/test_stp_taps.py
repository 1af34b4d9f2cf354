"""When a tap reads: in a training forward, for the microbatch that the schedule named, without drawing numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.taps import StpTaps
from megacpp_stp.stp.tokens import TokenCount

LAYER = 2
OPEN, CLOSED = 0, 1  # first iteration with the gradient


class Stack(torch.nn.Module):
    """A stage of one linear layer; like a TransformerLayer it returns a pair when told to."""

    def __init__(self, *, pair=False, recompute=None):
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=recompute, cuda_graph_impl="none", fp8=None, fp4=None)
        layer = Pair(4, 4) if pair else torch.nn.Linear(4, 4)
        layer.layer_number, layer.current_microbatch = LAYER, 0
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, hidden):
        if self.config.recompute_granularity == "full":
            return checkpoint(self.layers[0], hidden, use_reentrant=True)
        return self.layers[0](hidden)


class Pair(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden), "context"


def tapped(stack, *, start_step=OPEN, tokens=None):
    config = StpConfig(weight=1.0, n_spans=3, start_step=start_step, taps=(LAYER,), seed=5)
    taps = StpTaps(config, iteration=lambda: 0, data_rank=0, tokens=tokens)
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


# --- full recomputation -----------------------------------------------------------------------------


def gradients(stack, microbatches, order, *, tokens=None):
    """Gradients of several inputs: all forwards first, as in a pipeline, then the backwards in `order`."""
    counts = tokens and TokenCount(wanted=True)
    taps = tapped(stack, tokens=counts)
    inputs, outputs = [], []
    for number in range(microbatches):
        stack.layers[0].current_microbatch = number
        if tokens:
            taps.set_tokens(torch.tensor(tokens[number]))
        inputs.append(torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(number)).requires_grad_())
        outputs.append(stack(inputs[-1]))
    before = readings_so_far(taps)
    for number in order:
        outputs[number].sum().backward()
    return [hidden.grad for hidden in inputs], before, readings(taps)


def readings_so_far(taps):
    return int(taps.meter._sums[LAYER][2]) if LAYER in taps.meter._sums else 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("tokens", [None, (5, 48, 17)], ids=["mean over microbatches", "mean over tokens"])
def test_a_recomputed_layer_counts_once_with_the_microbatch_of_its_forward(order, tokens):
    """By the time it is recomputed, the schedule has named the last microbatch, and the last count."""
    torch.manual_seed(0)
    plain = Stack()
    recomputed = Stack(recompute="full")
    recomputed.load_state_dict(plain.state_dict())
    expected, before, after = gradients(plain, 3, order, tokens=tokens)
    assert (before, after) == (3, 3)
    found, before, after = gradients(recomputed, 3, order, tokens=tokens)
    assert (before, after) == (0, 3)
    for mine, truth in zip(found, expected, strict=True):
        assert torch.equal(mine, truth)


# --- tokens -----------------------------------------------------------------------------------------


def test_without_per_token_loss_nobody_needs_the_tokens():
    stack = Stack()
    taps = tapped(stack)
    taps.set_tokens(torch.tensor(7))
    stack(states())
    assert readings(taps) == 1


def test_a_count_serves_all_taps_of_one_forward_and_no_other():
    count = TokenCount(wanted=True)
    with pytest.raises(UserError, match="how many tokens"):
        count.of((0, 0))
    count.set(torch.tensor([7]))
    assert count.of((0, 0)).item() == count.of((0, 0)).item() == 7.0
    with pytest.raises(UserError, match="how many tokens"):
        count.of((0, 1))
    count.set(torch.tensor(9, dtype=torch.int32))
    assert count.of((0, 1)).item() == 9.0


def test_a_count_is_taken_over_by_value():
    count, mask = TokenCount(wanted=True), torch.tensor(3.0)
    count.set(mask)
    mask.zero_()
    assert count.of(0).item() == 3.0


def test_the_gradient_is_that_many_times_as_large():
    stack = Stack()
    count = TokenCount(wanted=True)
    taps = tapped(stack, tokens=count)
    grads = []
    for tokens in (0, 1, 40):
        hidden = states_of_seed()
        taps.set_tokens(torch.tensor(tokens))
        stack(hidden).sum().backward()
        grads.append(hidden.grad)
    without, one, forty = grads
    assert not torch.equal(one, without)
    torch.testing.assert_close(forty - without, 40 * (one - without), rtol=1e-4, atol=1e-5)


def states_of_seed():
    return torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
