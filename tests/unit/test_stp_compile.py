"""One graph, compiled once: whatever the seed, the iteration and the documents, shapes and code stay the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_stp.errors import UserError
from megacpp_stp.stp import compute_stp_loss
from megacpp_stp.stp.chord import chord_terms, compute_chord_loss
from megacpp_stp.stp.objective import stp_loss_at, stp_terms
from megacpp_stp.stp.sampler import DrawKey, draw_document_triples, draw_triples
from megacpp_stp.stp.seam import GradScale, inject

CPU = torch.device("cpu")
SHAPE = (33, 2, 16)  # [s, b, h]


def keyed(max_span):
    def step(hidden, key, documents):
        triples = draw_triples(key, length=33, batch=2, n_spans=3, device=hidden.device, max_span=max_span)
        return stp_loss_at(hidden, triples, sequence_first=True), triples

    return step


def packed(max_span):
    def step(hidden, key, documents):
        spans = draw_document_triples(key, documents, n_spans=3, max_span=max_span)
        loss = stp_loss_at(hidden, spans.positions, allowed=spans.allowed, sequence_first=True)
        return loss, spans.positions

    return step


STEPS = [keyed(None), keyed(8), packed(None), packed(8)]
NAMES = ["sequence", "window", "documents", "documents and window"]


def inputs(i):
    """Another iteration, another microbatch, other states and other documents; no triple allowed in the third."""
    random = torch.Generator().manual_seed(i)
    hidden = torch.randn(SHAPE, generator=random, dtype=torch.float64, requires_grad=True)
    key = DrawKey(seed=1234 + i, iteration=100 + i, microbatch=i % 2, data_rank=i, layer=4 + i).as_tensor(CPU)
    documents = (torch.rand(2, 33, generator=random) < 0.15).cumsum(1)
    documents[:, 20 + i :] = -1
    return hidden, key, torch.full_like(documents, -1) if i == 2 else documents


def compiled_once(function, backend):
    """`function` as one graph; any compilation after the first call is an error."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def call(*args, first, **options):
        with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
            return compiled(*args, **options)

    return call


def check_keyed(step, backend):
    torch._dynamo.reset()
    compiled = compiled_once(step, backend)
    losses = []
    for i in range(4):
        hidden, key, documents = inputs(i)
        loss, triples = compiled(hidden, key, documents, first=i == 0)
        (grad,) = torch.autograd.grad(loss, hidden)
        expected, same_triples = step(hidden, key, documents)
        (expected_grad,) = torch.autograd.grad(expected, hidden)
        assert torch.equal(triples, same_triples)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
        losses.append(loss.item())
    assert len(set(losses)) == 4


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_a_keyed_step_compiles_once(step):
    check_keyed(step, "aot_eager")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", [compute_stp_loss, compute_chord_loss])
def test_the_public_functions_compile_once(loss, backend):
    """With torch's own random stream: a generator object cannot enter a graph."""
    torch._dynamo.reset()
    compiled = compiled_once(lambda layers, documents: loss(layers, n_spans=4, documents=documents), backend)
    values = []
    for i in range(4):
        layers = [torch.randn(2, 33, 16, requires_grad=True) for _ in range(2)]
        documents = torch.randint(0, 3, (2, 33)).sort(dim=1).values
        torch.manual_seed(i)
        found = compiled(layers, documents, first=i == 0)
        torch.manual_seed(i)
        expected = loss(layers, n_spans=4, documents=documents)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        found.backward()
        assert all(layer.grad.abs().sum() > 0 for layer in layers)
        values.append(found.item())
    assert len(set(values)) == 4


@pytest.mark.parametrize(("terms", "points"), [(stp_terms, 3), (chord_terms, 4)])
def test_the_closed_forms_compile_once(terms, points):
    torch._dynamo.reset()
    compiled = compiled_once(lambda rows, allowed: terms(rows, tolerance=1e-7, allowed=allowed), "aot_eager")
    for i in range(3):
        rows = torch.randn(points, 6, 16)
        rows[:, :i] = 0
        allowed = torch.arange(6) < 5
        found, expected = compiled(rows, allowed, first=i == 0), terms(rows, tolerance=1e-7, allowed=allowed)
        assert found.valid.item() == 5 - i
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_key_of_python_integers_would_compile_anew():
    """What the tensor form of a key is for; should this fail one day, the form can go."""
    torch._dynamo.reset()
    compiled = compiled_once(lambda key: draw_triples(key, length=33, batch=2, n_spans=3, device=CPU), "eager")
    compiled(DrawKey(seed=1, iteration=1, microbatch=0, data_rank=0, layer=4), first=True)
    with pytest.raises(RuntimeError, match="recompile"):
        compiled(DrawKey(seed=1, iteration=2, microbatch=0, data_rank=0, layer=4), first=False)


class Operations(TorchDispatchMode):
    """What a call is made of, and all shapes it makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        masks = [a for group in args if isinstance(group, list | tuple) for a in group if isinstance(a, torch.Tensor)]
        assert all(mask.dtype != torch.bool for mask in masks) or "index" not in str(func), "index by a mask"
        made = result if isinstance(result, tuple | list) else (result,)
        self.seen.append((str(func), tuple(tuple(t.shape) for t in made if isinstance(t, torch.Tensor))))
        return result


# Operations that read values on the host, make shapes of values, or copy from host memory.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "lift", "equal.")


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_operations_and_shapes_do_not_depend_on_values(step):
    traces = []
    for i in range(4):
        hidden, key, documents = inputs(i)
        with Operations() as operations:
            loss, _ = step(hidden, key, documents)
            loss.backward()
        traces.append(operations.seen)
        assert not [name for name, _ in operations.seen if any(word in name for word in FORBIDDEN)]
    assert traces[0]
    assert all(trace == traces[0] for trace in traces)


@pytest.mark.parametrize("max_span", [None, 8])
def test_a_key_of_python_integers_is_never_copied_from_the_host(max_span):
    key = DrawKey(seed=1, iteration=2, microbatch=3, data_rank=4, layer=5)
    with Operations() as operations:
        draw_triples(key, length=33, batch=2, n_spans=3, device=CPU, max_span=max_span)
        draw_document_triples(key, torch.zeros(2, 33, dtype=torch.int64), n_spans=3, max_span=max_span)
        key.as_tensor(CPU)
    assert not [name for name, _ in operations.seen if any(word in name for word in FORBIDDEN)]


def check_tap(backend):
    """Draw, gather, closed form and seam, as a tap runs them, with a scale that is set between forward and backward."""

    def tap(hidden, key, scale):
        triples = draw_triples(key, length=33, batch=2, n_spans=3, device=hidden.device)
        index = (triples * 2 + torch.arange(2)).reshape(-1)
        rows = hidden.detach().reshape(66, 16).index_select(0, index).view(3, -1, 16)
        return inject(hidden, stp_terms(rows, tolerance=1e-7).grad.reshape(-1, 16), index, scale) * 2

    torch._dynamo.reset()
    compiled, scale = compiled_once(tap, backend), GradScale()
    for i in range(4):
        hidden, key, _ = inputs(i)
        out = compiled(hidden, key, scale, first=i == 0)
        scale.set(torch.tensor(3.0 + i))
        (found,) = torch.autograd.grad(out.sum(), hidden)
        (expected,) = torch.autograd.grad(tap(hidden, key, scale).sum(), hidden)
        assert torch.equal(out, 2 * hidden)
        assert (expected - 2).abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# The last one moves to forward what it can, as Inductor does, but generates no code.
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_a_tap_compiles_once_and_reads_the_scale_in_backward(backend):
    check_tap(backend)


def test_a_compiled_tap_whose_scale_nobody_sets_gives_nan():
    """The graph is built before the schedule speaks, so this cannot be an error; nor may it pass for a gradient."""
    torch._dynamo.reset()
    compiled, scale = torch.compile(inject, fullgraph=True, backend="aot_eager"), GradScale()
    hidden = torch.randn(3, 1, 2, requires_grad=True)
    compiled(hidden, torch.ones(1, 2), torch.tensor([1]), scale).sum().backward()
    assert hidden.grad[1].isnan().all()
    with pytest.raises(UserError, match="never set"):
        scale.get()


@pytest.mark.slow
def test_inductor_compiles_a_tap_once():
    """Real generated code; needs a C++ compiler on a CPU."""
    check_tap("inductor")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_inductor_compiles_a_keyed_step_once(step):
    """Real generated code; needs a C++ compiler on a CPU."""
    check_keyed(step, "inductor")
