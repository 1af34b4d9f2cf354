"""Oracles of the STP objective; derivations in megacpp_stp.stp.objective and the closed forms named in each test."""

import math

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp import compute_stp_loss
from megacpp_stp.stp.objective import random_triples, stp_loss_of_rows, stp_terms
from megacpp_stp.stp.reference import reference_stp_loss

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


def test_straight_lines_are_zero_right_angles_one_reversals_two():
    base, direction = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    orthogonal = torch.randn(4, dtype=torch.float64)
    orthogonal -= orthogonal.dot(direction) / direction.dot(direction) * direction
    for last, expected in ((base + 3.7 * direction, 0.0), (base + direction + orthogonal, 1.0), (base, 2.0)):
        triple = torch.stack((base, base + direction, last)).unsqueeze(1)
        loss = stp_terms(triple, tolerance=EPS64).loss
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_invariance_under_similarity_and_reversal_of_time():
    triple_rows = rows(11, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    moved = -2.5 * triple_rows @ rotation + torch.randn(6, dtype=torch.float64)
    reference = stp_terms(triple_rows, tolerance=EPS64).loss
    for other in (moved, triple_rows.flip(0), triple_rows.flip(1)):
        torch.testing.assert_close(stp_terms(other, tolerance=EPS64).loss, reference, rtol=0, atol=1e-12)


def test_gradient_identities():
    """Sum zero; g_s orthogonal to u, g_t to v; |g_s| = S/|u|, |g_t| = S/|v| with S = sqrt(L (2 - L))."""
    for n in (1, 9):
        triple_rows = rows(n, 8, seed=n)
        terms = stp_terms(triple_rows, tolerance=EPS64)
        g_s, g_r, g_t = terms.grad * n
        h_s, h_r, h_t = triple_rows
        u, v = h_r - h_s, h_t - h_r
        each = 1 - torch.nn.functional.cosine_similarity(u, v, dim=-1)
        size = (each * (2 - each)).sqrt()
        assert (g_s + g_r + g_t).abs().max() < 1e-12
        assert (g_s * u).sum(-1).abs().max() < 1e-12
        assert (g_t * v).sum(-1).abs().max() < 1e-12
        torch.testing.assert_close(g_s.norm(dim=-1), size / u.norm(dim=-1), rtol=1e-10, atol=0)
        torch.testing.assert_close(g_t.norm(dim=-1), size / v.norm(dim=-1), rtol=1e-10, atol=0)


def test_expectations_of_points_and_increments():
    """Independent points: 1.5; independent increments (a random walk): 1.0; standard error 0.002 here."""
    width, n = 512, 2000
    points = torch.randn(3, n, width, generator=generator())
    assert stp_terms(points, tolerance=1e-7).loss.item() == pytest.approx(1.5, abs=0.01)
    assert stp_terms(points.cumsum(0), tolerance=1e-7).loss.item() == pytest.approx(1.0, abs=0.01)


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


def test_rounding_of_bf16_states_is_no_direction():
    state = torch.full((1, 64), 100.0)
    neighbour = state.clone()
    neighbour[0, 0] += 0.5  # one unit in the last place of bf16 at 100
    triple = torch.stack((state, neighbour, state + torch.randn(1, 64) * 50))
    assert stp_terms(triple, tolerance=torch.finfo(torch.bfloat16).eps).valid.item() == 0
    assert stp_terms(triple, tolerance=torch.finfo(torch.float32).eps).valid.item() == 1


def test_nan_is_not_hidden():
    triple_rows = rows(3, 4)
    triple_rows[1, 1, 2] = math.nan
    assert math.isnan(stp_terms(triple_rows, tolerance=EPS64).loss.item())
    assert math.isnan(stp_loss_of_rows(triple_rows, tolerance=EPS64).item())


def test_the_public_function_agrees_with_the_plain_form():
    hidden = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    loss = compute_stp_loss(hidden, n_spans=3, generator=generator(5))
    drawn = random_triples(9, 6, generator=generator(5), device=torch.device("cpu"))
    triples = [(i % 2, *drawn[:, i].tolist()) for i in range(6)]
    truth = reference_stp_loss(hidden.transpose(0, 1), triples, tolerance=EPS64)
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, truth))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize(
    ("hidden", "n_spans"),
    [([], 1), (torch.randn(2, 8, 4), 0), (torch.randn(8, 4), 1), (torch.ones(2, 8, 4, dtype=torch.int64), 1)],
)
def test_what_has_no_meaning_is_an_error(hidden, n_spans):
    with pytest.raises(UserError):
        compute_stp_loss(hidden, n_spans=n_spans)
