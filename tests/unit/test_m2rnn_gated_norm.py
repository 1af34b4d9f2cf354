"""What follows the M2RNN recurrence, and the convolution before it, against the plain formulas.

Legend: s sequence, b batch, c channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacpp_stp.model.m2rnn.conv import causal_conv
from megacpp_stp.model.m2rnn.gated_norm import gated_norm
from megacpp_stp.model.m2rnn.reference import reference_causal_conv, reference_gated_norm
from tests.unit.test_m2rnn_scan import kept_bytes

SHAPES = [(5, 2, 6), (1, 1, 1), (7, 3, 33)]


def inputs_of(s: int, b: int, c: int, dtype: Any = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(s, b, c)] * 3 + [(c,)] * 2
    return [(2 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype) for shape in shapes]


def with_gradients(function: Any, tensors: list[Any], **options: Any) -> list[Any]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out.double().sin().sum(), leaves)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gated_norm_equals_the_reference_in_fp64_forward_and_backward(shape, eps):
    ours = with_gradients(gated_norm, inputs_of(*shape), eps=eps)
    theirs = with_gradients(reference_gated_norm, inputs_of(*shape), eps=eps)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gated_norm_has_the_gradients_of_finite_differences():
    leaves = [x.requires_grad_() for x in inputs_of(3, 2, 4)]
    assert torch.autograd.gradcheck(lambda *x: gated_norm(*x, eps=1e-2), leaves, eps=1e-6, atol=1e-8)


def test_gated_norm_rounds_once_from_fp32():
    narrow = inputs_of(40, 2, 64, torch.bfloat16)
    out = gated_norm(*narrow, eps=1e-5)
    exact = reference_gated_norm(*(x.double() for x in narrow), eps=1e-5)
    assert out.dtype == torch.bfloat16
    # Two bf16 neighbours are equally near, but for what fp32 gets wrong itself.
    assert (out == exact.bfloat16()).double().mean() > 0.999


def test_gated_norm_keeps_one_number_a_token_beside_its_inputs():
    leaves = [x.requires_grad_() for x in inputs_of(40, 2, 64, torch.bfloat16)]
    assert kept_bytes(lambda: gated_norm(*leaves, eps=1e-5), apart=leaves) == 40 * 2 * 4


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize(("s", "b", "c"), [(7, 2, 6), (1, 1, 1), (3, 2, 5)])
def test_convolution_equals_the_reference_in_fp64_forward_and_backward(s, b, c, taps):
    generator = torch.Generator().manual_seed(taps)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((s, b, c), (c, 1, taps), c)]
    ours, theirs = with_gradients(causal_conv, tensors), with_gradients(reference_causal_conv, tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
