"""The fused linear cross entropy against its plain reference, on one rank."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megacpp_stp.errors import UserError
from megacpp_stp.flce.chunked import Options, best_logits, linear_cross_entropy
from megacpp_stp.flce.reference import linear_cross_entropy_reference
from megacpp_stp.flce.tiles import LEAST_BLOCKS, LEAST_COLUMNS, TILE_BYTES, block_columns

TOKENS, HIDDEN, VOCAB = 37, 19, 103


def problem(*, dtype=torch.float64, tokens=TOKENS, hidden=HIDDEN, vocab=VOCAB, spread=1.0, seed=0):
    """Hidden states, weight, labels and a weight for each token's loss, some of them 0."""
    make = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (spread * torch.randn(vocab, hidden, generator=make, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=make)
    slopes = torch.rand(tokens, generator=make, dtype=torch.float64)
    slopes[::5] = 0
    return states, weight, labels, slopes.to(torch.promote_types(dtype, torch.float32))


def fused(states, weight, labels, slopes, **options):
    """Loss and both gradients."""
    loss, _ = linear_cross_entropy(states, weight, labels, Options(**options))
    return loss.detach(), *torch.autograd.grad(loss, (states, weight), slopes.view_as(loss))


def plain(states, weight, labels, slopes, **options):
    loss = linear_cross_entropy_reference(states, weight, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, (states, weight), slopes)


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("columns", [1, 10, 102, 103, 1000, None])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_loss_and_gradients_are_the_references(columns, scale):
    found = fused(*problem(), columns=columns, scale=scale)
    for value, wanted in zip(found, plain(*problem(), scale=scale), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_derivative_of_the_loss():
    states, weight, labels, _ = problem(tokens=5, hidden=3, vocab=11)
    options = Options(columns=4, scale=0.7)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, options)[0], (states, weight))


@pytest.mark.parametrize("ignore_index", [None, -100, 7])
def test_labels_that_are_ignored_or_no_class(ignore_index):
    states, weight, labels, slopes = problem()
    labels[1], labels[2], labels[3], labels[4] = -100, VOCAB, 7, -1
    found = fused(states, weight, labels, slopes, columns=10, ignore_index=ignore_index)
    for value, wanted in zip(found, plain(states, weight, labels, slopes, ignore_index=ignore_index), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    if ignore_index == 7:
        assert found[0][3] == 0 and not found[1][3].any() and found[1][4].any()


def test_far_logits_stay_finite():
    states, weight, labels, slopes = problem(dtype=torch.float32, spread=300.0)
    exact = [each.detach().double().requires_grad_() for each in (states, weight)]
    found = fused(states, weight, labels, slopes, columns=10)
    for value, wanted in zip(found, plain(*exact, labels, slopes.double()), strict=True):
        assert value.isfinite().all()
        assert relative(value, wanted) < 2e-4  # of logits around 3000 in fp32


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_bf16_is_no_worse_than_one_product_over_the_whole_vocabulary(spread):
    states, weight, labels, slopes = problem(dtype=torch.bfloat16, tokens=257, hidden=65, vocab=1000, spread=spread)
    exact = [each.detach().double().requires_grad_() for each in (states, weight)]
    wanted = plain(*exact, labels, slopes.double())
    upstream = plain(states, weight, labels, slopes)
    for value, other, truth in zip(fused(states, weight, labels, slopes, columns=24), upstream, wanted, strict=True):
        assert relative(value, truth) <= 1.01 * relative(other, truth)


def test_bf16_of_labels_that_are_almost_certain():
    """What is left of a label's own part must not drown in its block's rounding."""
    states, weight, _, slopes = problem(dtype=torch.bfloat16, tokens=64, hidden=64, vocab=64, spread=0.1)
    with torch.no_grad():
        weight.copy_(torch.eye(64))
        states.copy_(torch.eye(64) * 9)
    labels = torch.arange(64)
    wanted = plain(*(each.detach().double().requires_grad_() for each in (states, weight)), labels, slopes.double())
    upstream = plain(states, weight, labels, slopes)
    for value, other, truth in zip(fused(states, weight, labels, slopes, columns=8), upstream, wanted, strict=True):
        assert relative(value, truth) <= 1.01 * relative(other, truth) + 1e-7


def test_only_what_needs_a_gradient_gets_one():
    states, weight, labels, slopes = problem()
    wanted = plain(states, weight, labels, slopes)
    frozen, _ = linear_cross_entropy(states, weight.detach(), labels, Options(columns=10))
    torch.testing.assert_close(torch.autograd.grad(frozen, states, slopes)[0], wanted[1], rtol=1e-12, atol=1e-12)
    constant, _ = linear_cross_entropy(states.detach(), weight, labels, Options(columns=10))
    torch.testing.assert_close(torch.autograd.grad(constant, weight, slopes)[0], wanted[2], rtol=1e-12, atol=1e-12)
    neither, _ = linear_cross_entropy(states.detach(), weight.detach(), labels)
    assert not neither.requires_grad


def test_under_checkpointing_with_a_weight_that_is_also_an_embedding():
    _, weight, labels, slopes = problem()
    tokens = labels.roll(1)

    def model(loss_of, w):
        return loss_of(torch.tanh(torch.nn.functional.embedding(tokens, w)), w)

    def ours(h, w):
        return linear_cross_entropy(h, w, labels, Options(columns=10))[0]

    def reference(h, w):
        return linear_cross_entropy_reference(h, w, labels)

    again = checkpoint(model, ours, weight, use_reentrant=False)
    found = torch.autograd.grad(again, weight, slopes)[0]
    wanted = torch.autograd.grad(model(reference, weight), weight, slopes)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_shapes_of_a_model():
    states, weight, labels, slopes = problem(tokens=36)
    loss, _ = linear_cross_entropy(states.view(9, 4, HIDDEN), weight, labels.view(9, 4).int(), Options(columns=10))
    assert loss.shape == (9, 4)
    found = torch.autograd.grad(loss, (states, weight), slopes.view(9, 4))
    for value, wanted in zip(found, plain(states, weight, labels, slopes)[1:], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_the_largest_logits():
    states, weight, labels, slopes = problem()
    with torch.no_grad():  # whole numbers: sums are exact, and equals are equal
        states.round_()
        weight.round_()
        weight[5] *= 9
        weight[50] = weight[5]  # the first of equals counts
    logits = states @ weight.t()
    loss, best = linear_cross_entropy(states, weight, labels, Options(columns=10, with_best=True))
    assert best is not None and not best.values.requires_grad
    for found in (best, best_logits(states, weight, Options(columns=10))):
        torch.testing.assert_close(found.values, logits.amax(-1), rtol=1e-12, atol=1e-12)
        assert torch.equal(found.indices, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, states, slopes)[0], plain(states, weight, labels, slopes)[1], rtol=1e-12, atol=1e-12
    )


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_gradient_or_a_block(dtype):
    tokens, vocab, columns = 200, 3000, 64
    states, weight, labels, slopes = problem(dtype=dtype, tokens=tokens, vocab=vocab)
    with Largest() as seen:
        fused(states, weight, labels, slopes, columns=columns)
    assert seen.elements == vocab * HIDDEN < tokens * vocab / 10


def test_forward_keeps_two_numbers_a_token():
    states, weight, labels, _ = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear_cross_entropy(states, weight, labels, Options(columns=10))
    others = [each for each in kept if not any(each is given for given in (states, weight, labels))]
    assert [tuple(each.shape) for each in others] == [(TOKENS,), (TOKENS,)]


def test_a_block_fits_its_budget():
    for tokens, dtype, size in [(4096, torch.float32, 4), (4096, torch.bfloat16, 6), (1000, torch.float64, 8)]:
        columns = block_columns(tokens=tokens, vocabulary=131072, dtype=dtype)
        assert columns % 128 == 0 and columns > LEAST_COLUMNS
        assert columns * tokens * size <= TILE_BYTES < (columns + 128) * tokens * size
    assert block_columns(tokens=10**6, vocabulary=131072, dtype=torch.float32) == LEAST_COLUMNS
    assert block_columns(tokens=64, vocabulary=131072, dtype=torch.float32) == 131072 // LEAST_BLOCKS
    assert block_columns(tokens=4096, vocabulary=100, dtype=torch.float32) == 100
    assert block_columns(tokens=0, vocabulary=100, dtype=torch.float32) == 100


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h, w, y: (h.float(), w, y), "hidden, weight"),
        (lambda h, w, y: (h[:, :-1], w, y), "hidden, weight"),
        (lambda h, w, y: (h, w[0], y), "hidden, weight"),
        (lambda h, w, y: (h, w, y[:-1]), "labels"),
        (lambda h, w, y: (h, w, y.double()), "labels"),
    ],
)
def test_what_does_not_fit_is_refused(change, field):
    states, weight, labels, _ = problem()
    with pytest.raises(UserError) as error:
        linear_cross_entropy(*change(states, weight, labels))
    assert error.value.field == field


def test_a_block_without_columns_is_refused():
    states, weight, labels, _ = problem()
    with pytest.raises(UserError, match="a block needs a column"):
        linear_cross_entropy(states, weight, labels, Options(columns=0))


def test_no_second_derivative():
    states, weight, labels, slopes = problem()
    loss, _ = linear_cross_entropy(states, weight, labels)
    (gradient,) = torch.autograd.grad(loss, states, slopes.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_losses_of_uniform_logits():
    loss, _ = linear_cross_entropy(torch.zeros(3, 2), torch.ones(8, 2), torch.tensor([0, 4, 7]))
    torch.testing.assert_close(loss, torch.full((3,), math.log(8)))
