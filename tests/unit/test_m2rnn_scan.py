"""The M2RNN recurrence and its gate against the plain formulas: values, gradients, precision, memory.

Legend: s sequence, b batch, H heads, K key channels, V value channels, N positions between kept states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn.gate import log_forget_gate
from megacpp_stp.model.m2rnn.reference import reference_log_forget, reference_scan
from megacpp_stp.model.m2rnn.scan import m2rnn_scan

NAMES = ("query", "key", "value", "log_forget", "weight", "initial_state")


def scan_inputs(s: int, b: int, heads: int, k: int, v: int, *, dtype: Any = torch.float64, seed: int = 0) -> list[Any]:
    """Query to initial state; forget gates from long to short memory."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * torch.randn(shape, dtype=torch.float64, generator=generator)

    log_forget = -torch.exp(normal(s, b, heads, scale=2.0) - 1)
    weight = torch.eye(v, dtype=torch.float64) + normal(heads, v, v, scale=0.3)
    tensors = [normal(s, b, k), normal(s, b, k), normal(s, b, heads, v), log_forget, weight, normal(b, heads, k, v)]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(wide if x is log_forget else dtype).requires_grad_() for x in tensors]


def with_gradients(scan: Any, inputs: list[Any], **options: Any) -> list[Any]:
    """Output, last state, and the gradient of every input, for a loss that weighs each number differently."""
    output, state = scan(*inputs, **options)
    loss = (output.double().sin().sum() + (2 * state.double()).cos().sum()) / 3
    watched = [x for x in inputs if x is not None]
    return [output, state, *torch.autograd.grad(loss, watched)]


@pytest.mark.parametrize(
    ("s", "every"),
    [(1, 4), (3, 64), (4, 4), (5, 4), (13, 4), (16, 4), (7, 1), (9, 8)],
)
@pytest.mark.parametrize(("b", "heads", "k", "v"), [(2, 3, 5, 7), (1, 1, 1, 1)])
def test_scan_equals_the_reference_in_fp64_forward_and_backward(s, every, b, heads, k, v):
    inputs = scan_inputs(s, b, heads, k, v)
    ours = with_gradients(m2rnn_scan, inputs, checkpoint_every=every)
    theirs = with_gradients(reference_scan, inputs)
    for name, one, other in zip(("output", "state", *NAMES), ours, theirs, strict=True):
        assert one.dtype == torch.float64
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


def test_without_an_initial_state_it_is_zero():
    inputs = scan_inputs(9, 2, 3, 4, 5)
    zero = torch.zeros_like(inputs[-1]).requires_grad_()
    ours = with_gradients(m2rnn_scan, [*inputs[:-1], None], checkpoint_every=4)
    theirs = with_gradients(reference_scan, [*inputs[:-1], zero])[:-1]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_sequence_in_two_halves_is_the_whole():
    inputs = scan_inputs(11, 2, 3, 4, 5)
    whole, last = m2rnn_scan(*inputs, checkpoint_every=4)
    sequences, (weight, state) = inputs[:4], inputs[4:]
    parts = []
    for at in (slice(0, 6), slice(6, 11)):
        part, state = m2rnn_scan(*(x[at] for x in sequences), weight, state, checkpoint_every=4)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(state, last, rtol=1e-14, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    inputs = scan_inputs(5, 2, 2, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: m2rnn_scan(*x, checkpoint_every=2), inputs, eps=1e-6, atol=1e-8)


def test_strided_inputs_need_no_copy_by_the_caller():
    inputs = scan_inputs(6, 2, 3, 4, 5)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    for one, other in zip(with_gradients(m2rnn_scan, turned), with_gradients(m2rnn_scan, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


# --- precision ---------------------------------------------------------------------------------------


def test_with_bf16_inputs_states_and_sums_are_fp32():
    """The truth is the rounded inputs in fp64: gradients may miss it by their own last rounding, and no more."""
    narrow = scan_inputs(300, 2, 3, 4, 5, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    generator = torch.Generator().manual_seed(5)
    found = []
    for scan, inputs in ((m2rnn_scan, narrow), (reference_scan, wide)):
        outputs = scan(*inputs)
        # Numbers that bf16 holds exactly, so that both sides get the same gradient to start from.
        seeds = [torch.randint(-2, 3, x.shape, generator=generator.manual_seed(5)).to(x.dtype) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, seeds)])
    ours, theirs = found
    assert ours[1].dtype == torch.float32
    for name, one, other in zip(("output", "state", *NAMES), ours, theirs, strict=True):
        assert one.dtype == (torch.float32 if name in ("state", "log_forget") else torch.bfloat16)
        error = float((one.double() - other).detach().norm() / other.detach().norm())
        assert error < (1e-4 if one.dtype == torch.float32 else 2**-8), (name, error)


def long_memory(scan: Any) -> tuple[float, float]:
    """1000 writes of 1e-6 each, found and exact: in bf16 such an f is 1, and 1 - f from an fp32 f is 1 % off."""
    s, rate = 1000, torch.tensor(-1e-6)
    ones = torch.ones(s, 1, 1)
    _, state = scan(ones, 100 * ones, ones[..., None], rate.expand(s, 1, 1), torch.zeros(1, 1, 1))
    return float(state), float(-torch.expm1(s * rate.double()))


def test_a_memory_longer_than_16_bits_can_say_is_kept():
    found, exact = long_memory(m2rnn_scan)
    assert found == pytest.approx(exact, rel=1e-4)


def test_gate_equals_the_formula_and_stays_exact_at_both_ends():
    generator = torch.Generator().manual_seed(3)
    x = torch.linspace(-30, 30, 30, dtype=torch.float64).view(5, 2, 3)
    a_log, dt_bias = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    inputs = [t.requires_grad_() for t in (x, a_log, dt_bias)]
    ours, theirs = log_forget_gate(*inputs), reference_log_forget(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for one, other in zip(
        torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(theirs.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    extreme = log_forget_gate(torch.tensor([[[-60.0, 200.0]]]), torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(extreme, torch.tensor([[[-8.7565e-27, -200.0]]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_is_fp32_from_16_bit_inputs_with_fp32_parameters(dtype):
    x, a_log = torch.tensor([[[-8.0]]], dtype=dtype), torch.tensor([0.123456789])
    out = log_forget_gate(x, a_log, torch.zeros(1))
    assert out.dtype == torch.float32
    expected = reference_log_forget(x.double(), a_log.double(), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)


# --- memory ------------------------------------------------------------------------------------------


def kept_bytes(run: Any, *, apart: list[Any]) -> int:
    """Bytes of the storages that autograd saves during ``run``, but for those of ``apart``; each storage once."""
    outside = {x.untyped_storage().data_ptr() for x in apart}
    storages: dict[int, int] = {}

    def save(x: Any) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in outside:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        result = run()
    assert result is not None
    return sum(storages.values())


@pytest.mark.parametrize(("s", "every", "states"), [(1, 4, 0), (4, 4, 0), (5, 4, 1), (64, 16, 3), (65, 16, 4)])
def test_autograd_keeps_one_state_a_segment_beside_the_inputs(s, every, states):
    b, heads, k, v = 2, 3, 4, 5
    inputs = scan_inputs(s, b, heads, k, v, dtype=torch.bfloat16)
    found = kept_bytes(lambda: m2rnn_scan(*inputs, checkpoint_every=every), apart=inputs)
    assert found == states * b * heads * k * v * 4
    assert found <= b * (s // every + 1) * heads * k * v * 4
    _, last = m2rnn_scan(*inputs, checkpoint_every=every)
    assert last.untyped_storage().nbytes() == b * heads * k * v * 4


def test_the_default_keeps_a_state_every_64_positions():
    inputs = scan_inputs(193, 1, 1, 2, 2, dtype=torch.float32)
    assert kept_bytes(lambda: m2rnn_scan(*inputs), apart=inputs) == 3 * 2 * 2 * 4


# --- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("query", lambda x: x[1:], "must be of shape"),
        ("key", lambda x: x[:, :1], "must be of shape"),
        ("log_forget", lambda x: x[..., :2], "must be of shape"),
        ("weight", lambda x: x[:2], "must be of shape"),
        ("initial_state", lambda x: x[:1], "must be of shape"),
        ("log_forget", lambda x: x.bfloat16(), ".*16-bit"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, change, problem):
    inputs = dict(zip(NAMES, scan_inputs(4, 2, 3, 4, 5), strict=True))
    inputs[name] = change(inputs[name])
    with pytest.raises(UserError, match=f"^{name}: {problem}"):
        m2rnn_scan(**inputs)


def test_the_distance_between_kept_states_must_be_positive():
    with pytest.raises(UserError, match="^checkpoint_every: must be at least 1"):
        m2rnn_scan(*scan_inputs(4, 2, 3, 4, 5), checkpoint_every=0)
