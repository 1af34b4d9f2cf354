"""Oracles of the chord objective; the plain form is megacpp_stp.stp.reference.reference_chord_loss."""

import bisect
import itertools
import math
from collections import Counter

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp.chord import (
    chord_loss_of_rows,
    chord_terms,
    compute_chord_loss,
    patches_of_documents,
    patches_of_sequence,
)
from megacpp_stp.stp.objective import stp_terms
from megacpp_stp.stp.reference import reference_chord_loss, reference_patches
from megacpp_stp.stp.states import generator_words

EPS64 = torch.finfo(torch.float64).eps
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=7, width=5, seed=0):
    return torch.randn(4, n, width, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "width"), [(1, 3), (7, 5), (33, 17)])
def test_value_and_gradient_equal_the_plain_form(n, width):
    hidden = rows(n, width).requires_grad_()
    truth = reference_chord_loss(hidden, [(i, 0, 1, 2, 3) for i in range(n)], tolerance=EPS64)
    (grad,) = torch.autograd.grad(truth, hidden)
    terms = chord_terms(hidden.detach(), tolerance=EPS64)
    torch.testing.assert_close(terms.loss, truth.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(terms.grad, grad, rtol=0, atol=1e-12)
    differentiable = hidden.detach().clone().requires_grad_()
    loss = chord_loss_of_rows(differentiable, tolerance=EPS64)
    loss.backward()
    torch.testing.assert_close(loss.detach(), truth.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(differentiable.grad, grad, rtol=0, atol=1e-12)


def test_it_is_the_triple_form_where_the_patch_touches_an_end_and_nowhere_else():
    s, r, t, other = rows(9, 6)
    triple = stp_terms(torch.stack((s, r, t)), tolerance=EPS64)
    at_start = chord_terms(torch.stack((s, s, r, t)), tolerance=EPS64)
    at_end = chord_terms(torch.stack((s, r, t, t)), tolerance=EPS64)
    for chord in (at_start, at_end):
        torch.testing.assert_close(chord.loss, triple.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(at_start.grad[0] + at_start.grad[1], triple.grad[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(at_end.grad[2] + at_end.grad[3], triple.grad[2], rtol=0, atol=1e-12)
    inside = chord_terms(torch.stack((s, r, t, other)), tolerance=EPS64)
    assert (inside.loss - triple.loss).abs() > 1e-2


def test_lines_are_zero_and_a_patch_against_the_path_is_two():
    base, direction = rows(2, 6)[0]
    for places, expected in (((0, 1, 4, 4.5), 0.0), ((0, 0, 2, 5), 0.0), ((0, 4, 1, 9), 2.0)):
        points = torch.stack([base + place * direction for place in places]).unsqueeze(1)
        assert chord_terms(points, tolerance=EPS64).loss.item() == pytest.approx(expected, abs=1e-12)


def test_invariance_under_similarity_and_reversal_of_time():
    path = rows(11, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64)).Q
    moved = -2.5 * path @ rotation + torch.randn(6, generator=generator(2), dtype=torch.float64)
    loss = chord_terms(path, tolerance=EPS64).loss
    for other in (moved, path.flip(0), path.flip(1)):
        torch.testing.assert_close(chord_terms(other, tolerance=EPS64).loss, loss, rtol=0, atol=1e-12)


def test_gradient_identities():
    path = rows(9, 8)
    grad = chord_terms(path, tolerance=EPS64).grad
    g_a, g_s, g_r, g_e = grad
    assert grad.sum(0).abs().max() < 1e-12
    assert (g_s + g_r).abs().max() < 1e-12
    assert (g_a + g_e).abs().max() < 1e-12
    assert (g_e * (path[1] - path[0] + path[3] - path[2])).sum(-1).abs().max() < 1e-12
    assert (grad * path).sum((0, 2)).abs().max() < 1e-12
    turning = torch.einsum("pni,pnj->nij", path, grad)
    assert (turning - turning.transpose(1, 2)).abs().max() < 1e-12


def test_expectations_of_points_and_increments():
    """Independent points: 1 + 1/sqrt(2); independent increments: 1; standard error of a term 0.04 at most."""
    points = torch.randn(4, 4000, 512, generator=generator())
    assert chord_terms(points, tolerance=1e-7).loss.item() == pytest.approx(1 + math.sqrt(0.5), abs=0.004)
    assert chord_terms(points.cumsum(0), tolerance=1e-7).loss.item() == pytest.approx(1.0, abs=0.004)


def test_degenerate_and_forbidden_patches_count_for_nothing():
    good, same, other = rows(2, 4), *rows(1, 4, seed=1)[:2, 0]
    no_patch = torch.stack((other, same, same, 2 * other)).unsqueeze(1)
    closed = torch.stack((other, other, same, same)).unsqueeze(1)
    mixed = torch.cat((good, no_patch, closed, torch.full((4, 1, 4), math.nan, dtype=torch.float64)), dim=1)
    allowed = torch.tensor([True, True, True, True, False])
    alone, together = (
        chord_terms(good, tolerance=EPS64),
        chord_terms(mixed, tolerance=EPS64, allowed=allowed),
    )
    assert together.valid.item() == 2
    torch.testing.assert_close(together.loss, alone.loss)
    torch.testing.assert_close(together.grad[:, :2], alone.grad)
    assert together.grad[:, 2:].abs().sum() == 0
    differentiable = mixed.clone().requires_grad_()
    chord_loss_of_rows(differentiable, tolerance=EPS64, allowed=allowed).backward()
    torch.testing.assert_close(differentiable.grad, together.grad, rtol=0, atol=1e-12)
    assert math.isnan(chord_terms(mixed, tolerance=EPS64).loss.item())


@pytest.mark.parametrize("point", range(4))
def test_a_direction_is_small_by_the_longest_state_it_was_taken_from(point):
    """before + after is the difference of four states, so a long one anywhere makes a short sum rounding error."""
    path = torch.zeros(4, 1, 3, dtype=torch.float64)
    path[:, 0, 0] = torch.tensor([0.0, 1.0, 2.0, 1.5])  # u = 1 along x, and (1 - 0) + (1.5 - 2) = 0.5
    path[point, 0, 1] += 1000.0
    path[{0: 3, 3: 0, 1: 2, 2: 1}[point], 0, 1] += 1000.0  # neither direction sees it
    assert chord_terms(path, tolerance=0.5 / 1001).valid.item() == 1
    assert chord_terms(path, tolerance=0.5 / 999).valid.item() == 0


@pytest.mark.parametrize("length", range(3, 9))
def test_every_patch_comes_from_two_draws(length):
    words = torch.arange(length * (length - 1) - 2).reshape(1, -1, 1)
    counts = Counter(map(tuple, patches_of_sequence(words, length=length).reshape(4, -1).t().tolist()))
    assert counts == dict.fromkeys(reference_patches([0] * length), 2)


def patterns(length):
    for cuts in itertools.product((0, 1), repeat=length - 1):
        numbers = [0, *itertools.accumulate(cuts)]
        for pads in itertools.product((False, True), repeat=length):
            yield [-1 if pad else number for number, pad in zip(numbers, pads, strict=True)]


def test_patches_of_every_pattern_of_six_positions_are_exactly_uniform():
    for pattern in patterns(6):
        allowed = reference_patches(pattern)
        grid = torch.cartesian_prod(torch.arange(max(1, len(allowed))), torch.zeros(1, dtype=torch.int64))
        repeats = math.lcm(1, 2, 3, 4, 5)
        words = torch.cat((grid.repeat(repeats, 1), torch.arange(repeats).repeat_interleave(len(grid))[:, None]), dim=1)
        spans = patches_of_documents(words.t().unsqueeze(-1), torch.tensor([pattern]))
        if not allowed:
            assert not spans.allowed.any() and not spans.positions.any()
            continue
        counts = Counter(map(tuple, spans.positions.reshape(4, -1).t().tolist()))
        assert spans.allowed.all()
        assert counts == dict.fromkeys(allowed, repeats), pattern


def test_patches_of_a_long_document_equal_the_integer_form():
    """100000 positions have 5e9 patches, 33 bits: one division of 62 + 29 bits chooses the start."""
    length = 100_000
    words = torch.randint(0, 2**62, (3, 5, 1), generator=generator(7))
    positions, _ = patches_of_documents(words, torch.zeros(1, length, dtype=torch.int64))
    choices = [length - 2, *range(length - 2, -1, -1)]
    cumulative = list(itertools.accumulate(choices))
    for k, (first, second, third) in enumerate(words[:, :, 0].t().tolist()):
        number = (first << 29) + second % 2**29
        start = bisect.bisect_right(cumulative, number % cumulative[-1])
        assert positions[:, k, 0].tolist() == [0, start, start + 1 + third % choices[start], length - 1]


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("documents", [None, [[0] * 5 + [1] * 4, [-1, 0, 0, 0, 0, 0, 0, 0, -1]]])
def test_the_public_function_agrees_with_the_plain_form(documents, sequence_first):
    hidden = torch.randn((9, 2, 5) if sequence_first else (2, 9, 5), dtype=torch.float64, requires_grad=True)
    numbers = None if documents is None else torch.tensor(documents)
    loss = compute_chord_loss(
        hidden, n_spans=4, generator=generator(5), documents=numbers, sequence_first=sequence_first
    )
    words = generator_words(3, n_spans=4, batch=2, generator=generator(5), device=CPU)
    if numbers is None:
        drawn = patches_of_sequence(words, length=9)
    else:
        drawn = patches_of_documents(words, numbers).positions
    patches = [(b, *drawn[:, k, b].tolist()) for k in range(4) for b in range(2)]
    for b, *patch in patches:
        assert tuple(patch) in reference_patches([0] * 9 if documents is None else documents[b])
    hidden_sbh = hidden if sequence_first else hidden.transpose(0, 1)
    truth = reference_chord_loss(hidden_sbh, patches, tolerance=EPS64)
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, truth))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_edges_are_those_of_the_triple_form():
    for length in (0, 1, 2):
        loss = compute_chord_loss(torch.randn(2, length, 4, requires_grad=True), n_spans=1)
        assert loss.item() == 0.0 and not loss.requires_grad
    layers = [torch.randn(2, 8, 5, requires_grad=True) for _ in range(3)]
    source = generator(1)
    one_by_one = [compute_chord_loss(layer, n_spans=2, generator=source) for layer in layers]
    loss = compute_chord_loss(layers, n_spans=2, generator=generator(1))
    torch.testing.assert_close(loss, torch.stack(one_by_one).mean())
    loss.backward()
    assert all(layer.grad.abs().sum() > 0 for layer in layers)
    for hidden, options in (([], {}), (layers, {"n_spans": 0}), (layers, {"documents": torch.zeros(2, 8)})):
        with pytest.raises(UserError):
            compute_chord_loss(hidden, **{"n_spans": 1, **options})


def test_rounding_of_bf16_states_is_no_direction():
    """Of the two patches of three positions, one has it as its direction and one as what lies before and after."""
    state = torch.full((1, 3, 64), 100.0)
    state[0, 1, 0] += 0.5  # one unit in the last place of bf16 at 100
    state[0, 2] += torch.randn(64, generator=generator()) * 50
    assert compute_chord_loss(state.to(torch.bfloat16), n_spans=20).item() == 0.0
    assert compute_chord_loss(state, n_spans=20).item() > 0.0
