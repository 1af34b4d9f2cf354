"""Mamba-3's recurrence: the step-by-step truth against closed forms, and the chunked form against the truth.

Legend: s sequence, b batch, H heads, P channels of a head, G groups, N state channels, S rotated pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from megacpp_stp.model.mamba3.chunked import chunked_scan
from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.reference import reference_scan, rotate_pairs


def scan_inputs(
    s: int, *, b: int = 2, H: int = 4, P: int = 3, G: int = 2, N: int = 6, S: int = 0, seed: int = 0
) -> ScanInputs:
    """fp64 leaves, with steps and decays as large as they come in training, and larger."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    dt = torch.exp(normal(s, b, H) - 1)
    made = ScanInputs(
        x=normal(s, b, H, P),
        z=normal(s, b, H, P),
        B=normal(s, b, G, N),
        C=normal(s, b, G, N),
        dt=dt,
        log_decay=-dt * torch.exp(normal(s, b, H)),
        trap=torch.sigmoid(normal(s, b, H)),
        B_bias=1 + normal(H, N),
        C_bias=1 + normal(H, N),
        D=normal(H),
        angle=normal(s, b, S) if S else None,
    )
    return replace(made, **{name: tensor.requires_grad_() for name, tensor in made.tensors().items()})


def cast(inputs: ScanInputs, dtype: torch.dtype, **others: torch.dtype) -> ScanInputs:
    """Leaves in `dtype`, those named in `others` in theirs."""
    tensors = inputs.tensors().items()
    return replace(inputs, **{name: t.detach().to(others.get(name, dtype)).requires_grad_() for name, t in tensors})


def with_gradients(scan: Any, inputs: ScanInputs, **options: Any) -> dict[str, Tensor]:
    """y, and the gradient of every input under one fixed random cotangent."""
    y = scan(inputs, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16().to(y.dtype)
    tensors = inputs.tensors()
    gradients = torch.autograd.grad(y, list(tensors.values()), cotangent)
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm())
        for name in wanted
    }


# --- the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("G", "S"), [(1, 0), (2, 0), (4, 0), (1, 1), (2, 2), (4, 3)])
def test_reference_is_the_weighted_sum_over_all_pairs_of_steps(G, S):
    """The recurrence unrolled: y_t is a sum over i <= t, each term with the product of the decays in between."""
    s, H = 7, 4
    i = scan_inputs(s, G=G, S=S)
    head_of = torch.arange(H) // (H // G)
    k, q = i.B[:, :, head_of] + i.B_bias, i.C[:, :, head_of] + i.C_bias
    if S:
        theta = torch.cumsum(math.pi * torch.tanh(i.angle)[:, :, None, :] * i.dt[..., None], dim=0)
        # As complex numbers: pair (u, v) is u + i v, and a turn is a product with exp(i theta).
        k, q = (
            torch.cat(
                [
                    torch.view_as_real(
                        torch.view_as_complex(t[..., : 2 * S].unflatten(-1, (S, 2)).contiguous())
                        * torch.polar(torch.ones_like(theta), theta)
                    ).flatten(-2),
                    t[..., 2 * S :],
                ],
                dim=-1,
            )
            for t in (k, q)
        )
    rows = []
    for t in range(s):
        y = i.D[:, None] * i.x[t]
        for j in range(t + 1):
            weight = i.trap[j] * i.dt[j] * torch.exp(i.log_decay[j + 1 : t + 1].sum(0))
            if j < t:
                weight = weight + (1 - i.trap[j + 1]) * i.dt[j + 1] * torch.exp(i.log_decay[j + 1 : t + 1].sum(0))
            y = y + (weight * (q[t] * k[j]).sum(-1)).unsqueeze(-1) * i.x[j]
        rows.append(y * i.z[t] * torch.sigmoid(i.z[t]))
    torch.testing.assert_close(reference_scan(i), torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_rotation_turns_neighbouring_channels_and_leaves_the_rest():
    vectors = torch.tensor([1.0, 0.0, 0.0, 2.0, 5.0, 6.0])
    turned = rotate_pairs(vectors, torch.tensor([math.pi / 2, math.pi]))
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0, -2.0, 5.0, 6.0]), rtol=0, atol=1e-6)


def test_without_memory_and_trapezoid_a_step_sees_itself_only():
    i = scan_inputs(5)
    alone = replace(i, log_decay=torch.full_like(i.log_decay, -1e4), trap=torch.ones_like(i.trap))
    k, q = (t.repeat_interleave(2, dim=2) + bias for t, bias in ((i.B, i.B_bias), (i.C, i.C_bias)))
    y = (i.dt * (k * q).sum(-1) + i.D)[..., None] * i.x * torch.nn.functional.silu(i.z)
    torch.testing.assert_close(reference_scan(alone), y, rtol=1e-12, atol=1e-12)


# --- chunked against the truth ------------------------------------------------------------------


@pytest.mark.parametrize("S", [0, 1, 3])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize(
    ("s", "chunk_size", "chunks_in_span"),
    [
        (1, 4, 2),  # shorter than a chunk
        (8, 4, 2),  # one span exactly
        (13, 4, 2),  # a cut chunk in a cut span
        (17, 4, 1),  # one step past a boundary
        (23, 5, 3),  # nothing divides anything
        (11, 64, 8),  # the defaults, all padding but 11
        (9, 1, 2),  # the recurrence itself
    ],
)
def test_chunked_equals_the_reference_in_fp64(s, chunk_size, chunks_in_span, G, S):
    inputs = scan_inputs(s, G=G, S=S, seed=s)
    wanted = with_gradients(reference_scan, inputs)
    found = with_gradients(chunked_scan, inputs, chunk_size=chunk_size, chunks_in_span=chunks_in_span)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10, msg=name)
    # A single step has no past: nothing decays, and k and q turn together.
    without_effect = {"log_decay", "angle"} if s == 1 else set()
    assert {name for name, value in wanted.items() if float(value.abs().max()) == 0} <= without_effect


def test_chunked_passes_gradcheck():
    names, tensors = zip(*scan_inputs(5, b=1, H=2, P=2, G=1, N=4, S=1).tensors().items(), strict=True)

    def scan(*values: Tensor) -> Tensor:
        return chunked_scan(ScanInputs(**dict(zip(names, values, strict=True))), chunk_size=2, chunks_in_span=1)

    assert torch.autograd.gradcheck(scan, tensors)


@pytest.mark.parametrize("S", [0, 2])
def test_fp32_stays_at_rounding_over_a_long_sequence(S):
    inputs = scan_inputs(300, S=S)
    wanted = with_gradients(reference_scan, inputs)
    found = with_gradients(chunked_scan, cast(inputs, torch.float32), chunk_size=16)
    assert found["y"].dtype == torch.float32
    errors = relative_errors(found, wanted)
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("S", [0, 2])
def test_bf16_costs_the_rounding_of_inputs_and_outputs_only(S):
    """As the mixer calls it: fp32 steps, decays, biases.  The truth reads the same rounded values."""
    fp32 = dict.fromkeys(("dt", "log_decay", "trap", "B_bias", "C_bias", "D"), torch.float32)
    inputs = cast(scan_inputs(300, S=S), torch.bfloat16, **fp32)
    wanted = with_gradients(reference_scan, cast(inputs, torch.float64))
    found = with_gradients(chunked_scan, inputs, chunk_size=16)
    assert {name: found[name].dtype for name in fp32} == fp32
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    errors = relative_errors(found, wanted)
    rounded = {name for name, value in found.items() if value.dtype == torch.bfloat16}
    # 2^-9 is the largest relative error of one rounding to bf16.
    assert max(errors[name] for name in rounded) < 1.01 * 2**-9, errors
    assert max(errors[name] for name in found.keys() - rounded) < 1e-5, errors


def test_bf16_input_keeps_an_fp32_state():
    """In bf16 a state of 1 that grows by 2^-12 a step would stay at 1 for ever."""
    s = 512
    one = torch.ones(s, 1, 1, 1, dtype=torch.bfloat16)
    flat = torch.full((s, 1, 1), 2.0**-12)
    inputs = ScanInputs(
        x=one,
        z=torch.full_like(one, 40.0),
        B=one,
        C=one,
        dt=torch.cat([torch.ones(1, 1, 1), flat[1:]]),
        log_decay=torch.zeros_like(flat),
        trap=torch.ones_like(flat),
        B_bias=torch.zeros(1, 1),
        C_bias=torch.zeros(1, 1),
        D=torch.zeros(1),
    )
    y = chunked_scan(inputs, chunk_size=8, chunks_in_span=2)
    assert float(y[-1]) == 40 * 1.125


def test_padding_is_exact_and_later_steps_change_nothing_before_them():
    inputs = scan_inputs(40, S=2)
    first = ScanInputs(**{n: t[:21] if t.shape[0] == 40 else t for n, t in inputs.tensors().items()})
    whole, cut = (chunked_scan(i, chunk_size=8, chunks_in_span=2) for i in (inputs, first))
    torch.testing.assert_close(cut, whole[:21], rtol=1e-12, atol=1e-12)


def test_a_decay_that_underflows_gives_zeros_and_no_nan():
    inputs = cast(scan_inputs(20), torch.float32)
    steep = replace(inputs, log_decay=torch.full_like(inputs.log_decay, -500.0).requires_grad_())
    found = with_gradients(chunked_scan, steep, chunk_size=8)
    wanted = with_gradients(reference_scan, cast(steep, torch.float64))
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def test_chunked_runs_inside_a_checkpoint_of_the_whole_layer():
    inputs = scan_inputs(13, S=1)
    wanted = with_gradients(chunked_scan, inputs, chunk_size=4, chunks_in_span=1)
    for reentrant in (True, False):

        def again(values: ScanInputs, reentrant: bool = reentrant) -> Tensor:
            names = list(values.tensors())

            def scan(*tensors: Tensor) -> Tensor:
                given = ScanInputs(**dict(zip(names, tensors, strict=True)))
                return chunked_scan(given, chunk_size=4, chunks_in_span=1)

            return checkpoint(scan, *values.tensors().values(), use_reentrant=reentrant)

        leaves = cast(inputs, torch.float64)
        y = again(leaves)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16().to(y.dtype))
        for name, leaf in leaves.tensors().items():
            assert torch.equal(leaf.grad, wanted[name]), name


# --- memory -------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that any one result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_is_larger_than_the_inputs_or_a_span():
    b, H, P, N, chunk_size, m = 1, 2, 3, 6, 16, 2
    for s in (256, 512):
        inputs = scan_inputs(s, b=b, H=H, P=P, N=N, S=2)
        with LargestTensor() as largest:
            with_gradients(chunked_scan, inputs, chunk_size=chunk_size, chunks_in_span=m)
        a_span = chunk_size * m * b * H * max(N, P, chunk_size)
        assert largest.numel <= max(a_span, s * b * H * P, s * b * H * N)


class Storages(TorchDispatchMode):
    """Remembers which storages were made, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, Tensor):
                self.alive[value.untyped_storage()] = value.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("S", [0, 2])
def test_autograd_keeps_the_steps_and_one_state_a_span(S):
    """Of what the forward pass made, this outlives it: y, three numbers a step and head, the carry of each span."""
    s, b, H, P, N, chunk_size, m = 256, 2, 4, 3, 6, 8, 2
    inputs = scan_inputs(s, b=b, H=H, P=P, N=N, S=S)
    with Storages() as storages:
        y = chunked_scan(inputs, chunk_size=chunk_size, chunks_in_span=m)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.tensors().values()}
    kept = sum(size for storage, size in storages.alive.items() if storage.data_ptr() not in given) // 8
    spans = s // (chunk_size * m)
    expected = y.numel() + 3 * s * b * H + spans * b * H * (P * N + S)
    assert kept == pytest.approx(expected, rel=0.02)
