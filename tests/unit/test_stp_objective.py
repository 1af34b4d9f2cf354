"""Oracles of the STP objective; derivations in megacpp_stp.stp.objective and the closed forms named in each test."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_stp.errors import UserError
from megacpp_stp.stp import compute_stp_loss
from megacpp_stp.stp.objective import stp_loss_at, stp_loss_of_rows, stp_terms
from megacpp_stp.stp.reference import reference_stp_loss
from megacpp_stp.stp.states import generator_words
from megacpp_stp.stp.windows import triples_of_sequence

EPS64 = torch.finfo(torch.float64).eps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=7, width=5, seed=0, dtype=torch.float64):
    return torch.randn(3, n, width, generator=generator(seed), dtype=dtype)


def as_hidden(triple_rows):
    """[3, n, h] rows as an [s, b, h] tensor of n sequences of three states, and its triples."""
    return triple_rows, [(i, 0, 1, 2) for i in range(triple_rows.shape[1])]


@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 3), (7, 5), (33, 17)])
def test_value_and_gradient_equal_the_plain_form(n, width):
    if width == 1:
        triple_rows = torch.tensor([[[0.5]], [[1.25]], [[-2.0]]], dtype=torch.float64)
    else:
        triple_rows = rows(n, width)
    hidden, triples = as_hidden(triple_rows.clone().requires_grad_())
    truth = reference_stp_loss(hidden, triples, tolerance=EPS64)
    (grad,) = torch.autograd.grad(truth, hidden)
    terms = stp_terms(triple_rows, tolerance=EPS64)
    torch.testing.assert_close(terms.loss, truth.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.grad, grad, rtol=0, atol=1e-12)
    differentiable = triple_rows.clone().requires_grad_()
    loss = stp_loss_of_rows(differentiable, tolerance=EPS64)
    loss.backward()
    torch.testing.assert_close(loss.detach(), truth.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(differentiable.grad, grad, rtol=0, atol=1e-12)


def test_the_gradient_is_the_finite_difference():
    assert torch.autograd.gradcheck(lambda x: stp_loss_of_rows(x, tolerance=EPS64), (rows().requires_grad_(),))


def orthonormal(width=6, seed=0):
    random = torch.randn(width, width, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(random).Q


@pytest.mark.parametrize("degrees", [0, 1e-3, 30, 90, 150, 180 - 1e-3, 180])
@pytest.mark.parametrize(("step_u", "step_v"), [(1.0, 1.0), (0.01, 7.0)])
def test_the_value_is_one_minus_the_cosine_of_the_bend(degrees, step_u, step_v):
    """0 on a line however its points are spaced, 1 at a right angle, 2 on a reversal."""
    x, y, base, *_ = orthonormal()
    angle = math.radians(degrees)
    turn = math.cos(angle) * x + math.sin(angle) * y
    triple = torch.stack((base, base + step_u * x, base + step_u * x + step_v * turn)).unsqueeze(1)
    # 2 sin(angle/2)**2 is 1 - cos(angle) without its cancellation.
    assert stp_terms(triple, tolerance=EPS64).loss.item() == pytest.approx(2 * math.sin(angle / 2) ** 2, abs=1e-12)


def test_the_value_stays_in_range_and_precise_in_fp32():
    line = torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]], [[5.0, 10.0, 15.0]]])
    assert stp_terms(line, tolerance=1e-7).loss.item() == 0.0
    for seed in range(50):
        u = torch.randn(1, 64, generator=generator(seed))
        for v in (u * 0.37, -u * 0.37):
            triple = torch.stack((torch.zeros_like(u), u, u + v))
            assert 0.0 <= stp_terms(triple, tolerance=1e-7).loss.item() <= 2.0
            assert 0.0 <= stp_loss_of_rows(triple, tolerance=1e-7).item() <= 2.0
    slight = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[2.0, 2.0**-13]]])
    # 1 - cos in fp32 is 0 here.
    assert stp_terms(slight, tolerance=1e-7).loss.item() == pytest.approx(2.0**-27, rel=1e-5)


def test_invariance_under_similarity_and_reversal_of_time():
    triple_rows = rows(11, 6)
    moved = -2.5 * triple_rows @ orthonormal() + torch.randn(6, generator=generator(1), dtype=torch.float64)
    order = torch.randperm(11, generator=generator(2))
    reference = stp_terms(triple_rows, tolerance=EPS64).loss
    for other in (moved, triple_rows.flip(0), triple_rows[:, order]):
        torch.testing.assert_close(stp_terms(other, tolerance=EPS64).loss, reference, rtol=0, atol=1e-12)
    stretched = triple_rows * torch.arange(1, 7, dtype=torch.float64)
    assert (stp_terms(stretched, tolerance=EPS64).loss - reference).abs() > 1e-3


@pytest.mark.parametrize("n", [1, 9])
def test_gradient_identities(n):
    """With S = sqrt(L (2 - L)): what translations, directions, scalings and rotations leave unchanged."""
    triple_rows = rows(n, 8, seed=n)
    grad = stp_terms(triple_rows, tolerance=EPS64).grad * n
    g_s, g_r, g_t = grad
    h_s, h_r, h_t = triple_rows
    u, v = h_r - h_s, h_t - h_r
    each = 1 - torch.nn.functional.cosine_similarity(u, v, dim=-1)
    size, one, other = (each * (2 - each)).sqrt(), u.norm(dim=-1), v.norm(dim=-1)
    assert (g_s + g_r + g_t).abs().max() < 1e-12
    assert (g_s * u).sum(-1).abs().max() < 1e-12
    assert (g_t * v).sum(-1).abs().max() < 1e-12
    assert (grad * triple_rows).sum((0, 2)).abs().max() < 1e-12
    turning = torch.einsum("pni,pnj->nij", triple_rows, grad)
    assert (turning - turning.transpose(1, 2)).abs().max() < 1e-12
    torch.testing.assert_close(g_s.norm(dim=-1), size / one, rtol=1e-10, atol=0)
    torch.testing.assert_close(g_t.norm(dim=-1), size / other, rtol=1e-10, atol=0)
    squared = size**2 * (1 / one**2 + 1 / other**2 + 2 * (1 - each) / (one * other))
    torch.testing.assert_close(g_r.square().sum(-1), squared, rtol=1e-10, atol=0)
    doubled = stp_terms(2 * triple_rows, tolerance=EPS64).grad * n
    torch.testing.assert_close(doubled, grad / 2, rtol=0, atol=1e-12)


def test_lines_and_reversals_are_stationary():
    x, _, base, *_ = orthonormal()
    for step in (2.0, -2.0):
        triple = torch.stack((base, base + x, base + (1 + step) * x)).unsqueeze(1)
        assert stp_terms(triple, tolerance=EPS64).grad.abs().max() < 1e-12
        differentiable = triple.requires_grad_()
        stp_loss_of_rows(differentiable, tolerance=EPS64).backward()
        assert differentiable.grad.abs().max() < 1e-12


def test_the_loss_bounds_the_distance_from_the_chord():
    """The paper's lemma: r is |u||v| sqrt(L (2 - L)) / |u + v| away from the line through s and t."""
    triple_rows = rows(1, 5, seed=4)
    (h_s,), (h_r,), (h_t,) = triple_rows
    loss = stp_terms(triple_rows, tolerance=EPS64).loss
    chord = (h_t - h_s) / (h_t - h_s).norm()
    distance = (h_r - h_s - (h_r - h_s).dot(chord) * chord).norm()
    expected = (h_r - h_s).norm() * (h_t - h_r).norm() * (loss * (2 - loss)).sqrt() / (h_t - h_s).norm()
    torch.testing.assert_close(distance, expected, rtol=1e-10, atol=0)


def test_states_of_one_length_cannot_be_straight():
    """On a sphere L >= 1 - cos(half the arc from s to t), with equality on the shorter arc: r anywhere on it."""
    x, y, *_ = orthonormal()
    for arc, part in itertools.product((0.3, 1.5, 3.0), (0.1, 0.5, 0.8)):
        points = [math.cos(a) * x + math.sin(a) * y for a in (0.0, part * arc, arc)]
        loss = stp_terms(torch.stack(points).unsqueeze(1), tolerance=EPS64).loss.item()
        assert loss == pytest.approx(1 - math.cos(arc / 2), abs=1e-12)


@pytest.mark.parametrize(("width", "points"), [(2, 1.405), (8, 1.475), (64, 1.497), (512, 1.5)])
def test_expectations_of_points_and_increments(width, points):
    """Independent points: 1.5 in many dimensions; independent increments (a random walk): 1.0 in any."""
    n = 40_000 if width < 64 else 4000
    states = torch.randn(3, n, width, generator=generator())
    # A term's standard deviation is 0.7 for one dimension at most; 4 standard errors.
    margin = 4 * min(1.0, 1 / width**0.5) / n**0.5 + 5e-4
    assert stp_terms(states, tolerance=1e-7).loss.item() == pytest.approx(points, abs=margin)
    assert stp_terms(states.cumsum(0), tolerance=1e-7).loss.item() == pytest.approx(1.0, abs=margin)


def test_degenerate_triples_count_for_nothing():
    good, same = rows(2, 4), torch.randn(4, dtype=torch.float64)
    bad = torch.stack((same, same, torch.randn(4, dtype=torch.float64))).unsqueeze(1)
    zero = torch.zeros(3, 1, 4, dtype=torch.float64)
    mixed = torch.cat((good, bad, zero), dim=1)
    alone, together = stp_terms(good, tolerance=EPS64), stp_terms(mixed, tolerance=EPS64)
    assert together.valid.item() == 2
    torch.testing.assert_close(together.loss, alone.loss)
    torch.testing.assert_close(together.grad[:, :2], alone.grad)
    assert torch.equal(together.grad[:, 2:], torch.zeros(3, 2, 4, dtype=torch.float64))
    differentiable = mixed.clone().requires_grad_()
    stp_loss_of_rows(differentiable, tolerance=EPS64).backward()
    torch.testing.assert_close(differentiable.grad, together.grad, rtol=0, atol=1e-12)
    nothing = stp_terms(bad, tolerance=EPS64)
    assert (nothing.loss.item(), nothing.valid.item(), nothing.grad.abs().sum().item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("places", [(0.0, 1.0, -5.0), (1.0, 0.2, -1.0)])
def test_a_direction_is_small_by_the_longer_of_its_states(places):
    """The first step is 1 of the longer state and 0.8 of it, the second more than all of either of its states."""
    path = torch.tensor(places, dtype=torch.float64).reshape(3, 1, 1)
    for triple in (path, path.flip(0)):
        assert stp_terms(triple, tolerance=1.0).valid.item() == 0
        assert stp_terms(triple, tolerance=0.7).valid.item() == 1


def test_rounding_of_bf16_states_is_no_direction():
    state = torch.full((1, 64), 100.0)
    neighbour = state.clone()
    neighbour[0, 0] += 0.5  # one unit in the last place of bf16 at 100
    triple = torch.stack((state, neighbour, state + torch.randn(1, 64) * 50))
    assert stp_terms(triple, tolerance=torch.finfo(torch.bfloat16).eps).valid.item() == 0
    assert stp_terms(triple, tolerance=torch.finfo(torch.float32).eps).valid.item() == 1
    hidden = triple.transpose(0, 1).to(torch.bfloat16)
    assert compute_stp_loss(hidden, n_spans=1).item() == 0.0
    assert compute_stp_loss(hidden.float(), n_spans=1).item() > 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("point", [0, 1, 2])
def test_what_is_no_number_is_not_hidden(value, point):
    triple_rows = rows(3, 4)
    triple_rows[point, 1, 2] = value
    assert math.isnan(stp_terms(triple_rows, tolerance=EPS64).loss.item())
    assert math.isnan(stp_loss_of_rows(triple_rows, tolerance=EPS64).item())
    triple_rows[1] = triple_rows[0]  # a degenerate direction beside it does not hide it
    triple_rows[2, 1, 2] = value
    assert math.isnan(stp_terms(triple_rows, tolerance=EPS64).loss.item())
    assert math.isnan(stp_loss_of_rows(triple_rows, tolerance=EPS64).item())


def test_triples_that_are_not_allowed_count_for_nothing_whatever_they_hold():
    good = rows(3, 4)
    mixed = torch.cat((good, torch.full((3, 2, 4), math.nan, dtype=torch.float64)), dim=1)
    allowed = torch.tensor([True, True, True, False, False])
    alone, together = stp_terms(good, tolerance=EPS64), stp_terms(mixed, tolerance=EPS64, allowed=allowed)
    assert together.valid.item() == 3
    torch.testing.assert_close(together.loss, alone.loss, rtol=0, atol=0)
    torch.testing.assert_close(together.grad[:, :3], alone.grad, rtol=0, atol=0)
    assert together.grad[:, 3:].abs().sum() == 0
    differentiable = mixed.clone().requires_grad_()
    stp_loss_of_rows(differentiable, tolerance=EPS64, allowed=allowed).backward()
    torch.testing.assert_close(differentiable.grad, together.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [-90, -40, 40, 90])
def test_states_whose_squares_leave_fp32_are_computed_all_the_same(exponent):
    triple_rows = rows(5, 7, dtype=torch.float32)
    plain = stp_terms(triple_rows, tolerance=1e-7)
    scaled = stp_terms(triple_rows * 2.0**exponent, tolerance=1e-7)
    assert scaled.valid.item() == 5
    torch.testing.assert_close(scaled.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.grad * 2.0**exponent, plain.grad, rtol=1e-5, atol=1e-7)
    differentiable = (triple_rows * 2.0**exponent).requires_grad_()
    stp_loss_of_rows(differentiable, tolerance=1e-7).backward()
    torch.testing.assert_close(differentiable.grad * 2.0**exponent, plain.grad, rtol=1e-5, atol=1e-7)


def test_states_below_the_smallest_normal_number_have_no_direction():
    triple_rows = rows(5, 7, dtype=torch.float32) * 2.0**-140
    terms = stp_terms(triple_rows, tolerance=1e-7)
    assert (terms.loss.item(), terms.valid.item(), terms.grad.abs().sum().item()) == (0.0, 0.0, 0.0)
    one_step = torch.tensor([0.0, 2.0**-140, 1.0]).reshape(3, 1, 1)
    for triple in (one_step, one_step.flip(0)):
        assert stp_terms(triple, tolerance=1e-7).valid.item() == 0


@pytest.mark.parametrize(("max_span", "sequence_first"), [(None, False), (None, True), (3, False), (2, True)])
def test_the_public_function_agrees_with_the_plain_form(max_span, sequence_first):
    hidden = torch.randn((9, 2, 5) if sequence_first else (2, 9, 5), dtype=torch.float64, requires_grad=True)
    loss = compute_stp_loss(hidden, n_spans=3, generator=generator(5), max_span=max_span, sequence_first=sequence_first)
    words = generator_words(4, n_spans=3, batch=2, generator=generator(5), device=torch.device("cpu"))
    drawn = triples_of_sequence(words, length=9, max_span=max_span)
    triples = [(b, *drawn[:, k, b].tolist()) for k in range(3) for b in range(2)]
    hidden_sbh = hidden if sequence_first else hidden.transpose(0, 1)
    truth = reference_stp_loss(hidden_sbh, triples, tolerance=EPS64)
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, truth))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_generator_draws_anew_each_time_and_the_same_from_its_seed():
    hidden = torch.randn(1, 64, 8)
    source = generator(3)
    values = [compute_stp_loss(hidden, n_spans=1, generator=source).item() for _ in range(4)]
    assert len(set(values)) == 4
    assert compute_stp_loss(hidden, n_spans=1, generator=generator(3)).item() == values[0]


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes; views make none."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.numel())
        return result


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_makes_and_keeps_nothing_of_the_sequences_size(sequence_first, transposed):
    """Batch 2, 4 spans, 8 channels: 3 * 8 * 8 numbers are gathered of 2 * 500 * 8, and 4 * 2 * 8 words drawn."""
    hidden = torch.randn(500, 2, 8) if sequence_first != transposed else torch.randn(2, 500, 8)
    if transposed:
        hidden = hidden.transpose(0, 1)
    hidden = hidden.to(torch.bfloat16).requires_grad_()
    kept = []
    with Sizes() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = compute_stp_loss(hidden, n_spans=4, sequence_first=sequence_first)
    assert loss.requires_grad and kept
    assert made.largest <= 2 * 3 * 8 * 8
    assert max(kept) <= 3 * 8 * 8


def test_loss_at_given_triples():
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)
    triples = torch.tensor([[[0, 1]], [[1, 2]], [[4, 3]]])
    truth = reference_stp_loss(hidden.transpose(0, 1), [(0, 0, 1, 4), (1, 1, 2, 3)], tolerance=EPS64)
    torch.testing.assert_close(stp_loss_at(hidden, triples), truth, rtol=0, atol=1e-12)
    first = reference_stp_loss(hidden.transpose(0, 1), [(0, 0, 1, 4)], tolerance=EPS64)
    only = stp_loss_at(hidden, triples, allowed=torch.tensor([[True, False]]))
    torch.testing.assert_close(only, first, rtol=0, atol=1e-12)


def test_three_positions_have_one_triple():
    hidden = torch.randn(4, 3, 6, dtype=torch.float64)
    truth = stp_terms(hidden.transpose(0, 1), tolerance=EPS64).loss
    torch.testing.assert_close(compute_stp_loss(hidden, n_spans=5), truth)


def test_a_list_is_the_mean_and_feeds_every_layer():
    layers = [torch.randn(2, 8, 5, requires_grad=True) for _ in range(3)]
    loss = compute_stp_loss(layers, n_spans=2, generator=generator(1))
    source = generator(1)
    one_by_one = [compute_stp_loss(layer, n_spans=2, generator=source) for layer in layers]
    torch.testing.assert_close(loss, torch.stack(one_by_one).mean())
    loss.backward()
    assert all(layer.grad.abs().sum() > 0 for layer in layers)


def test_more_spans_have_less_variance():
    hidden = torch.randn(1, 64, 8)

    def spread(n_spans):
        source = generator(3)
        return torch.stack([compute_stp_loss(hidden, n_spans=n_spans, generator=source) for _ in range(400)]).std()

    assert spread(16) < 0.5 * spread(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_computed_in_fp32(dtype):
    hidden = torch.randn(2, 16, 32).to(dtype).requires_grad_()
    loss = compute_stp_loss(hidden, n_spans=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    assert torch.isfinite(hidden.grad).all()


def test_short_sequences_have_no_triple():
    for length in (0, 1, 2):
        loss = compute_stp_loss(torch.randn(2, length, 4, requires_grad=True), n_spans=1)
        assert loss.item() == 0.0
        assert not loss.requires_grad


def test_an_empty_batch_has_no_triple():
    assert compute_stp_loss(torch.randn(0, 8, 4), n_spans=2).item() == 0.0


STATES = torch.randn(2, 8, 4)


@pytest.mark.parametrize(
    ("field", "hidden", "options"),
    [
        ("hidden", [], {}),
        ("n_spans", STATES, {"n_spans": 0}),
        ("max_span", STATES, {"max_span": 1}),
        ("max_span", STATES[:, :2], {"max_span": 1}),
        ("hidden", STATES[0], {}),
        ("hidden", [STATES, STATES[0]], {}),
        ("hidden", STATES[..., :0], {}),
        ("hidden", STATES.to(torch.int64), {}),
    ],
)
def test_what_has_no_meaning_is_an_error(field, hidden, options):
    with pytest.raises(UserError, match=f"^{field}: "):
        compute_stp_loss(hidden, **{"n_spans": 1, **options})
