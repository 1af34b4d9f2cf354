"""When a tap reads: in a training forward, for the microbatch that the schedule named, without drawing numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import FINAL_NORM, StpConfig
from megacpp_stp.stp.microbatch import Announcement
from megacpp_stp.stp.taps import Place, StpTaps

LAYER = 2
OPEN, CLOSED = 0, 1  # first iteration with the gradient


class Stack(torch.nn.Module):
    """A stage of one linear layer; like a TransformerLayer it returns a pair when told to."""

    def __init__(self, *, pair=False, recompute=None, final_norm=False):
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=recompute, cuda_graph_impl="none", fp8=None, fp4=None)
        layer = Pair(4, 4) if pair else torch.nn.Linear(4, 4)
        layer.layer_number, layer.current_microbatch = LAYER, 0
        self.layers = torch.nn.ModuleList([layer])
        if final_norm:  # on the last stage alone, as HybridStack has it
            self.final_norm = torch.nn.RMSNorm(4)

    def forward(self, hidden):
        if self.config.recompute_granularity == "full":
            hidden = checkpoint(self.layers[0], hidden, use_reentrant=True)
        else:
            hidden = self.layers[0](hidden)
        return self.final_norm(hidden) if hasattr(self, "final_norm") else hidden


class Pair(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden), "context"


def tapped(stack, *, start_step=OPEN, announcement=None, **config):
    config = StpConfig(**{"weight": 1.0, "n_spans": 3, "start_step": start_step, "taps": (LAYER,), "seed": 5} | config)
    taps = StpTaps(config, iteration=lambda: 0, data_rank=0, announcement=announcement)
    taps.scale.set(torch.ones(1))
    taps.attach(stack)
    return taps


def readings(taps, tap=LAYER):
    return taps.meter.reduce(device=torch.device("cpu"), groups=[]).readings_by_tap[tap]


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


# --- the final norm ---------------------------------------------------------------------------------


def test_the_states_after_the_final_norm_are_tapped_where_it_is():
    first, last = Stack(), Stack(final_norm=True)
    taps = tapped(first, taps=(LAYER, FINAL_NORM))
    assert taps.attach(last) == (LAYER, FINAL_NORM)
    assert is_seamed(last(states()))
    reading = taps.meter.reduce(device=torch.device("cpu"), groups=[])
    assert reading.readings_by_tap == {LAYER: 1, FINAL_NORM: 1}
    assert tapped(Stack(), taps=(FINAL_NORM,)).attach(first) == ()


@pytest.mark.parametrize("recompute", [None, "full"])
def test_the_tap_after_the_norm_reads_normed_states_of_the_right_microbatch_once(recompute):
    stack, hidden = Stack(final_norm=True, recompute=recompute), states()
    taps = tapped(stack, taps=(FINAL_NORM,))
    stack.layers[0].current_microbatch = 3
    mine = hidden.clone().requires_grad_()
    output = stack(mine)
    stack.layers[0].current_microbatch = 7  # the schedule goes on before the backward pass
    output.square().sum().backward()
    again = StpTaps(taps.config, iteration=lambda: 0, data_rank=0)
    again.scale.set(torch.ones(1))
    plain = hidden.clone().requires_grad_()
    normed = stack.final_norm.forward(stack.layers[0](plain))  # past the hooks
    again.read(normed, tap=FINAL_NORM, place=Place(0, 3)).square().sum().backward()
    assert torch.equal(mine.grad, plain.grad)
    assert readings(taps, FINAL_NORM) == 1


def test_evaluation_leaves_the_final_norm_alone():
    stack = Stack(final_norm=True).eval()
    taps = tapped(stack, taps=(FINAL_NORM,))
    assert not is_seamed(stack(states()))
    assert readings(taps, FINAL_NORM) == 0


# --- full recomputation -----------------------------------------------------------------------------


def gradients(stack, microbatches, order, *, tokens=None):
    """Gradients of several inputs: all forwards first, as in a pipeline, then the backwards in `order`."""
    taps = tapped(stack, announcement=tokens and Announcement(tokens=True))
    inputs, outputs = [], []
    for number in range(microbatches):
        stack.layers[0].current_microbatch = number
        if tokens:
            taps.set_microbatch(tokens=torch.tensor(tokens[number]))
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
    taps.set_microbatch(tokens=torch.tensor(7))
    stack(states())
    assert readings(taps) == 1


def test_a_count_serves_all_taps_of_one_forward_and_no_other():
    said = Announcement(tokens=True)
    with pytest.raises(UserError, match="how many tokens"):
        said.of((0, 0))
    said.set(tokens=torch.tensor([7]))
    assert said.of((0, 0)).tokens.item() == said.of((0, 0)).tokens.item() == 7.0
    with pytest.raises(UserError, match="how many tokens"):
        said.of((0, 1))
    said.set(tokens=torch.tensor(9, dtype=torch.int32))
    assert said.of((0, 1)).tokens.item() == 9.0


def test_a_count_is_taken_over_by_value():
    said, mask = Announcement(tokens=True), torch.tensor(3.0)
    said.set(tokens=mask)
    mask.zero_()
    assert said.of(0).tokens.item() == 3.0


def test_documents_are_asked_for_only_where_spans_stay_inside_them():
    documents = torch.zeros(2, 8, dtype=torch.int64)
    deaf, keen = Announcement(), Announcement(documents=True)
    for said in (deaf, keen):
        said.set(tokens=torch.tensor(3.0), documents=documents)
    assert deaf.of(0) == (None, None)
    assert keen.of(0) == (None, documents)
    with pytest.raises(UserError, match="where the documents") as caught:
        keen.of(1)
    assert caught.value.field == "stp.within_documents"
    keen.set(tokens=torch.tensor(3.0))
    with pytest.raises(UserError, match="where the documents"):
        keen.of(0)


def test_the_gradient_is_that_many_times_as_large():
    stack = Stack()
    taps = tapped(stack, announcement=Announcement(tokens=True))
    grads = []
    for tokens in (0, 1, 40):
        hidden = states_of_seed()
        taps.set_microbatch(tokens=torch.tensor(tokens))
        stack(hidden).sum().backward()
        grads.append(hidden.grad)
    without, one, forty = grads
    assert not torch.equal(one, without)
    torch.testing.assert_close(forty - without, 40 * (one - without), rtol=1e-4, atol=1e-5)


def states_of_seed():
    return torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
