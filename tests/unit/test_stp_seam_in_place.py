"""The seam adds into the passing gradient where it alone holds it, and into a copy where anybody else does."""

import pytest
import torch

from megacpp_stp.stp.seam import GradScale, inject

SHAPE = (6, 2, 3)  # [s, b, h]
INDEX = torch.tensor([3, 0, 3, 11])
ROWS = torch.arange(12.0).reshape(4, 3) + 1


class Passing(torch.autograd.Function):
    """Identity that notes where the gradient lies, without holding it."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.places = places
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.places.append(grad.data_ptr())
        return grad, None


class Made(torch.autograd.Function):
    """Identity whose backward makes the gradient anew, and shows it to `then`."""

    @staticmethod
    def forward(ctx, x, places, then):
        ctx.places, ctx.then = places, then
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        made = grad.clone()
        ctx.places.append(made.data_ptr())
        ctx.then(made)
        return made, None, None


def run(then=lambda grad: None, *, on_tapped=lambda tapped: None, after=lambda tapped: tapped):
    """Gradient of x, where it lay before and after the seam, and what came out of the tap."""
    scale, places = GradScale(), []
    scale.set(torch.tensor(0.5))
    x = torch.randn(SHAPE, requires_grad=True)
    tapped = inject(Passing.apply(x, places), ROWS, INDEX, scale)
    on_tapped(tapped)
    incoming = torch.randn(SHAPE)
    kept = incoming.clone()
    Made.apply(after(tapped), places, then).backward(incoming)
    assert torch.equal(incoming, kept)
    expected = incoming.reshape(12, 3).index_add(0, INDEX, 0.5 * ROWS).view(SHAPE)
    return x.grad, expected, places[0] == places[1], incoming


def test_a_gradient_that_nobody_else_holds_is_added_into():
    grad, expected, in_place, _ = run()
    assert in_place
    torch.testing.assert_close(grad, expected)


HOLDERS = {
    "the gradient itself": lambda grad: grad,
    "a view of it": lambda grad: grad[2:],
    "a detached alias": lambda grad: grad.detach(),
    "its storage": lambda grad: grad.untyped_storage(),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_gradient_that_somebody_holds_is_left_as_it_is(hold):
    held = []
    grad, expected, in_place, incoming = run(then=lambda made: held.append(hold(made)))
    assert not in_place
    torch.testing.assert_close(grad, expected)
    if isinstance(held[0], torch.Tensor):
        assert torch.equal(held[0], incoming[2:] if held[0].shape != SHAPE else incoming)


def test_a_hook_that_keeps_the_gradient_keeps_what_it_saw():
    held = []
    grad, expected, in_place, incoming = run(on_tapped=lambda tapped: tapped.register_hook(lambda g: held.append(g)))
    assert not in_place
    assert torch.equal(held[0], incoming)
    torch.testing.assert_close(grad, expected)


def test_a_retained_gradient_is_the_one_before_the_seam():
    kept = []
    grad, expected, _, incoming = run(on_tapped=lambda tapped: (tapped.retain_grad(), kept.append(tapped)))
    assert torch.equal(kept[0].grad, incoming)
    torch.testing.assert_close(grad, expected)


def test_a_residual_branch_keeps_its_gradient():
    """The sum hands one tensor to both; the other branch reads it after the seam has run."""
    scale, seen = GradScale(), []
    scale.set(torch.tensor(0.5))
    y, x = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    sibling = Made.apply(y, [], lambda grad: seen.append(grad))
    tapped = inject(x * 1, ROWS, INDEX, scale)  # made after its sibling, so it goes back first
    incoming = torch.randn(SHAPE)
    (tapped + sibling).backward(incoming)
    assert torch.equal(y.grad, incoming)
    torch.testing.assert_close(x.grad, incoming.reshape(12, 3).index_add(0, INDEX, 0.5 * ROWS).view(SHAPE))


def test_both_gradients_asked_for_at_once_are_right():
    scale = GradScale()
    scale.set(torch.tensor(0.5))
    x = torch.randn(SHAPE, requires_grad=True)
    tapped = inject(x * 1, ROWS, INDEX, scale)
    incoming = torch.randn(SHAPE)
    before, after = torch.autograd.grad(tapped * 2, [tapped, x], incoming)
    assert torch.equal(before, 2 * incoming)
    torch.testing.assert_close(after, (2 * incoming).reshape(12, 3).index_add(0, INDEX, 0.5 * ROWS).view(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["batch first", "expanded"])
def test_a_gradient_of_any_strides(layout, dtype):
    scale = GradScale()
    scale.set(torch.tensor(0.5))
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    tapped, contiguous = inject(x * 1, ROWS, INDEX, scale), []
    tapped.grad_fn.register_hook(lambda to_hidden, _: contiguous.append(to_hidden[1].is_contiguous()))
    incoming = torch.randn(2, 6, 3, dtype=dtype).transpose(0, 1)
    if layout == "expanded":
        incoming = torch.ones((), dtype=dtype).expand(SHAPE)
        tapped.sum().backward()
    else:
        tapped.transpose(0, 1).backward(incoming.transpose(0, 1))
    assert contiguous == [True]  # a GPU adds sparse rows to nothing else
    expected = incoming.double().reshape(12, 3).index_add(0, INDEX, 0.5 * ROWS.double()).view(SHAPE)
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.1)


def test_a_second_backward_through_a_kept_graph_gives_the_same():
    scale = GradScale()
    scale.set(torch.tensor(0.5))
    x = torch.randn(SHAPE, requires_grad=True)
    out = inject(x * 1, ROWS, INDEX, scale) * 3
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
