import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_stp.errors import UserError
from megacpp_stp.stp import taps as taps_module
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.layout import SequenceLayout, reference_positions
from megacpp_stp.stp.meter import Meter
from megacpp_stp.stp.microbatch import Announcement, Facts
from megacpp_stp.stp.objective import stp_terms
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from megacpp_stp.stp.seam import GradScale, coalesce, inject
from megacpp_stp.stp.taps import Place, StpTaps

CONFIG = StpConfig(weight=0.3, n_spans=5, start_step=10, taps=(2, 4), seed=7)


def scale_of(value):
    scale = GradScale()
    scale.set(torch.tensor([value]))
    return scale


def taps_at(iteration, config=CONFIG, scale=1.0):
    taps = StpTaps(config, iteration=lambda: iteration, data_rank=0)
    taps.scale.set(torch.tensor([scale]))
    return taps


def test_rows_of_one_position_are_summed_once():
    rows = torch.randn(6, 3)
    index = torch.tensor([4, 1, 4, 4, 0, 1])
    joined = coalesce(rows, index)
    torch.testing.assert_close(
        torch.zeros(5, 3).index_add(0, index, joined), torch.zeros(5, 3).index_add(0, index, rows)
    )
    assert torch.equal(joined[[2, 3, 5]], torch.zeros(3, 3))


def test_forward_is_bit_identical_and_backward_adds_scaled_rows():
    hidden = torch.randn(7, 2, 3, requires_grad=True)
    rows, index = torch.randn(4, 3), torch.tensor([3, 0, 3, 13])
    out = inject(hidden, rows, index, scale_of(0.25))
    assert torch.equal(out, hidden)
    upstream = torch.randn(7, 2, 3)
    kept = upstream.clone()
    (grad,) = torch.autograd.grad(out, hidden, upstream)
    expected = upstream.reshape(14, 3).index_add(0, index, 0.25 * rows).view(7, 2, 3)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(upstream, kept)  # a residual branch may hold the same tensor


def test_a_sibling_branch_keeps_its_own_gradient():
    """x feeds the seam and a second branch through one add: both get the same gradient tensor from autograd."""
    x, y = torch.randn(4, 1, 2, requires_grad=True), torch.randn(4, 1, 2, requires_grad=True)
    rows = torch.full((1, 2), 100.0)
    (inject(x, rows, torch.tensor([0]), scale_of(1.0)) + y).sum().backward()
    assert torch.equal(y.grad, torch.ones(4, 1, 2))
    assert x.grad[0].tolist() == [[101.0, 101.0]]


def test_the_scale_is_read_in_backward():
    scale = scale_of(1.0)
    hidden = torch.zeros(3, 1, 2, requires_grad=True)
    out = inject(hidden, torch.ones(1, 2), torch.tensor([1]), scale)
    scale.set(torch.tensor(8.0))
    out.sum().backward()
    assert hidden.grad[1].tolist() == [[9.0, 9.0]]


def test_a_scale_that_nobody_set_is_an_error():
    with pytest.raises(UserError, match="never set"):
        GradScale().get()


def test_nothing_of_the_sequence_is_kept_alive():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        for length in (64, 1024):
            hidden = torch.randn(length, 2, 16, requires_grad=True)
            taps_at(10).read(hidden, tap=2, place=Place(10, 0))
    assert len(saved) == 4
    assert saved[:2] == saved[2:]
    assert max(saved) == 3 * CONFIG.n_spans * 2 * 16


def reference_of_tap(hidden, *, iteration, layer, microbatch, weight):
    """weight / taps x mean over triples of 1 - cos, written for autograd with a gather."""
    s, b, h = hidden.shape
    key = DrawKey(seed=CONFIG.seed, iteration=iteration, microbatch=microbatch, data_rank=0, layer=layer)
    triples = draw_triples(key, length=s, batch=b, n_spans=CONFIG.n_spans, device=hidden.device)
    h_s, h_r, h_t = (hidden.gather(0, p.unsqueeze(-1).expand(-1, -1, h)) for p in triples)
    loss = (1 - torch.nn.functional.cosine_similarity(h_r - h_s, h_t - h_r, dim=-1)).mean()
    return weight / len(CONFIG.taps) * loss, loss


@pytest.mark.parametrize(("length", "batch", "width"), [(3, 1, 2), (5, 3, 7), (33, 2, 16)])
def test_a_tap_gives_the_gradient_of_plain_autograd(length, batch, width):
    """Short sequences too, where triples share positions."""
    states = torch.randn(length, batch, width, dtype=torch.float64)
    weights = torch.randn_like(states)
    mine, plain = states.clone().requires_grad_(), states.clone().requires_grad_()
    taps = taps_at(10, scale=4.0)
    (taps.read(mine, tap=4, place=Place(10, 3)) * weights).sum().backward()
    weighted, loss = reference_of_tap(plain, iteration=10, layer=4, microbatch=3, weight=CONFIG.weight)
    ((plain * weights).sum() + 4.0 * weighted).backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-12)
    reading = taps.meter.reduce(device=torch.device("cpu"), groups=[])
    assert reading.loss_by_tap[4] == pytest.approx(loss.item(), abs=1e-12)
    assert reading.readings_by_tap == {2: 0, 4: 1}
    assert reading.valid_fraction == 1.0


@pytest.mark.parametrize(
    ("iteration", "weight"), [(0, 0.3), (9, 0.3), (10, 0.0)], ids=["start", "before the gate", "weight 0"]
)
def test_without_weight_or_before_the_gate_the_state_passes_untouched(iteration, weight):
    config = StpConfig(weight=weight, n_spans=5, start_step=10, taps=(2, 4), seed=7)
    hidden = torch.randn(8, 2, 4, requires_grad=True)
    taps = taps_at(iteration, config)
    assert taps.read(hidden, tap=2, place=Place(iteration, 0)) is hidden
    assert taps.meter.reduce(device=torch.device("cpu"), groups=[]).readings_by_tap == {2: 1, 4: 0}


def test_bf16_states_get_bf16_gradients_from_fp32_rows():
    hidden = torch.randn(16, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    taps_at(10).read(hidden, tap=2, place=Place(10, 0)).float().sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.isfinite(hidden.grad).all()


def test_the_meter_averages_over_microbatches_and_starts_anew():
    meter = Meter((3,))
    for loss, valid in ((1.0, 4.0), (0.5, 2.0)):
        meter.add(3, loss=torch.tensor(loss), valid=torch.tensor(valid), triples=4)
    reading = meter.reduce(device=torch.device("cpu"), groups=[])
    assert (reading.loss, reading.readings_by_tap[3], reading.valid_fraction) == (0.75, 2, 0.75)
    assert meter.reduce(device=torch.device("cpu"), groups=[]).readings_by_tap == {3: 0}


def test_the_meter_weighs_microbatches_by_their_tokens():
    meter = Meter((3,))
    for loss, tokens in ((1.0, 30.0), (0.5, 10.0), (9.0, 0.0)):
        meter.add(3, loss=torch.tensor(loss), valid=torch.tensor(4.0), triples=4, weight=torch.tensor(tokens))
    reading = meter.reduce(device=torch.device("cpu"), groups=[])
    assert (reading.loss, reading.readings_by_tap[3], reading.valid_fraction) == (0.875, 3, 1.0)


def test_a_step_without_a_token_that_counts_has_no_loss():
    meter = Meter((3,))
    meter.add(3, loss=torch.tensor(1.0), valid=torch.tensor(4.0), triples=4, weight=torch.tensor(0.0))
    assert meter.reduce(device=torch.device("cpu"), groups=[]).loss is None


def test_a_microbatch_without_a_span_that_counts_is_no_straightness():
    """Its loss is 0 by definition: mixed in, collapse and empty documents would read as straight paths."""
    meter = Meter((3, 7))
    meter.add(3, loss=torch.tensor(1.25), valid=torch.tensor(4.0), triples=4)
    for tap in (3, 7):
        meter.add(tap, loss=torch.tensor(0.0), valid=torch.tensor(0.0), triples=4)
    reading = meter.reduce(device=torch.device("cpu"), groups=[])
    assert reading.loss_by_tap == {3: 1.25, 7: None}
    assert reading.straightness_by_tap == {3: -0.25, 7: None}
    assert (reading.loss, reading.valid_fraction) == (1.25, 1 / 3)
    assert reading.straightness_by_family({3: "A", 7: "R"}) == {"A": -0.25, "R": None}


def test_no_number_is_never_hidden():
    meter = Meter((3,))
    meter.add(3, loss=torch.tensor(torch.nan), valid=torch.tensor(0.0), triples=4)
    assert math.isnan(meter.reduce(device=torch.device("cpu"), groups=[]).loss)


def test_a_tap_weighs_its_reading_by_the_tokens():
    hidden = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    taps = taps_at(10)
    for number, tokens in enumerate((3.0, 1.0)):
        taps.read(hidden, tap=2, place=Place(10, number, Facts(tokens=torch.tensor(tokens))))
    weighted = taps.meter.reduce(device=torch.device("cpu"), groups=[]).loss_by_tap[2]
    alone = []
    for number in (0, 1):
        taps.read(hidden, tap=2, place=Place(10, number))
        alone.append(taps.meter.reduce(device=torch.device("cpu"), groups=[]).loss_by_tap[2])
    assert weighted == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], abs=1e-6)
    assert abs(weighted - sum(alone) / 2) > 1e-3


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2), (2, 2), (3, 2)])
def test_the_parts_of_a_sequence_have_together_the_gradient_and_loss_of_the_whole(monkeypatch, tensor, context):
    """Each part in its turn, with the rows that the other ranks would send taken from the whole."""
    whole = torch.randn(24, 2, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    monkeypatch.setattr(
        taps_module, "span_terms", lambda _, them, **kwargs: (rows.append(them), stp_terms(them, **kwargs))[1]
    )
    taps = taps_at(10)
    taps.read(whole, tap=2, place=Place(10, 1)).sum().backward()
    truth = taps.meter.reduce(device=torch.device("cpu"), groups=[])

    def share(layout, mine, owned):
        assert torch.equal(mine[owned], rows[0].view(-1, 5)[owned])
        return rows[0].view(-1, 5)

    monkeypatch.setattr(SequenceLayout, "share", share)
    joined = torch.zeros_like(whole)
    for tensor_rank, context_rank in product(range(tensor), range(context)):
        layout = SequenceLayout(
            tensor_size=tensor, tensor_rank=tensor_rank, context_size=context, context_rank=context_rank
        )
        positions = reference_positions(layout, 24)
        part = whole.detach()[positions].requires_grad_()
        taps = StpTaps(CONFIG, iteration=lambda: 10, data_rank=0, layout=layout)
        taps.scale.set(torch.ones(1))
        taps.read(part, tap=2, place=Place(10, 1)).sum().backward()
        assert taps.meter.reduce(device=torch.device("cpu"), groups=[]) == truth
        joined[positions] = part.grad
    assert torch.equal(joined, whole.grad)


class Operations(TorchDispatchMode):
    """The names of all operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["triple", "chord"])
def test_a_tap_never_waits_for_the_device(monkeypatch, objective):
    """Under all splits, with token counts and documents: nothing reads a value back, or has a shape by one."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    layout = SequenceLayout(tensor_size=2, tensor_rank=1, context_size=2, context_rank=1, group=object())
    announcement = Announcement(tokens=True, documents=True, context_group=object())
    config = replace(CONFIG, objective=objective, within_documents=True)
    taps = StpTaps(config, iteration=lambda: 10, data_rank=0, layout=layout, announcement=announcement)
    taps.scale.set(torch.ones(1))
    hidden = torch.randn(6, 2, 4, requires_grad=True)
    with Operations() as seen:
        taps.set_microbatch(tokens=torch.ones(2, 6).sum(), documents=torch.arange(48).reshape(2, 24) // 9)
        taps.read(hidden, tap=2, place=Place(10, 0, announcement.of(0))).sum().backward()
    assert {"index_select", "_sparse_coo_tensor_with_dims_and_tensors"} <= set(seen.names)
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"} & set(seen.names)
    assert hidden.grad.isfinite().all()
