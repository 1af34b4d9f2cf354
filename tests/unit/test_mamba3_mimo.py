"""Mamba-3 with several inputs and outputs of a head: the truth against sums of one, the chunked form against the truth.

Legend: s sequence, b batch, H heads, P channels of a head, G groups, N state channels, S rotated pairs, R inputs and
outputs of a head at each step.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megacpp_stp.model.mamba3.chunked import chunked_scan
from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.reference import reference_mimo_scan, reference_scan
from tests.unit.test_mamba3_scan import cast, relative_errors, scan_inputs, with_gradients


def mimo_inputs(
    s: int, R: int, *, b: int = 2, H: int = 4, P: int = 3, G: int = 2, N: int = 6, S: int = 0
) -> ScanInputs:
    """fp64 leaves; the outputs' and inputs' weights of both signs."""
    generator = torch.Generator().manual_seed(100 * s + R)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    made = replace(
        scan_inputs(s, b=b, H=H, P=P, G=G, N=N, S=S, seed=s),
        B=normal(s, b, G, R, N),
        C=normal(s, b, G, R, N),
        B_bias=1 + normal(H, R, N),
        C_bias=1 + normal(H, R, N),
        mimo_x=normal(H, R, P),
        mimo_z=normal(H, R, P),
        mimo_o=normal(H, R, P),
    )
    return cast(made, torch.float64)


def one_of(inputs: ScanInputs, source: int, reader: int) -> ScanInputs:
    """What output `reader` reads of input `source`, as a recurrence with one of each, without skip connection."""
    assert inputs.mimo_x is not None and inputs.mimo_z is not None
    return replace(
        inputs,
        x=inputs.x * inputs.mimo_x[:, source],
        z=inputs.z * inputs.mimo_z[:, reader],
        B=inputs.B[:, :, :, source],
        C=inputs.C[:, :, :, reader],
        B_bias=inputs.B_bias[:, source],
        C_bias=inputs.C_bias[:, reader],
        D=inputs.D if source == reader else torch.zeros_like(inputs.D),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_o")),
    )


@pytest.mark.parametrize(("R", "G", "S"), [(1, 2, 0), (2, 1, 3), (3, 4, 1)])
def test_reference_is_the_sum_over_all_inputs_of_what_each_output_reads(R, G, S):
    """The state is linear in its inputs, and each output is gated and weighted by itself."""
    inputs = mimo_inputs(9, R, G=G, S=S)
    wanted = sum(
        inputs.mimo_o[:, reader] * reference_scan(one_of(inputs, source, reader))
        for source in range(R)
        for reader in range(R)
    )
    torch.testing.assert_close(reference_mimo_scan(inputs), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("G", "S"), [(1, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize(
    ("s", "R", "chunk_size", "chunks_in_span"),
    [
        (1, 2, 4, 2),
        (8, 4, 4, 2),
        (13, 3, 4, 2),
        (11, 2, 64, 8),
        (9, 3, 1, 2),
        (7, 1, 4, 1),
    ],
)
def test_chunked_equals_the_reference_in_fp64(s, R, chunk_size, chunks_in_span, G, S):
    inputs = mimo_inputs(s, R, G=G, S=S)
    wanted = with_gradients(reference_mimo_scan, inputs)
    found = with_gradients(chunked_scan, inputs, chunk_size=chunk_size, chunks_in_span=chunks_in_span)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10, msg=name)
    without_effect = {"log_decay", "angle"} if s == 1 else set()
    assert {name for name, value in wanted.items() if float(value.abs().max()) == 0} <= without_effect


def test_chunked_passes_gradcheck():
    names, tensors = zip(*mimo_inputs(3, 2, b=1, H=2, P=2, G=1, N=4, S=1).tensors().items(), strict=True)

    def scan(*values: Tensor) -> Tensor:
        return chunked_scan(ScanInputs(**dict(zip(names, values, strict=True))), chunk_size=2, chunks_in_span=1)

    assert torch.autograd.gradcheck(scan, tensors)


def test_bf16_costs_the_rounding_of_inputs_and_outputs_only():
    """As the mixer calls it: what `KeepsFp32` keeps is fp32.  The truth reads the same rounded values."""
    kept = ("dt", "log_decay", "trap", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")
    inputs = cast(mimo_inputs(150, 2, S=2), torch.bfloat16, **dict.fromkeys(kept, torch.float32))
    wanted = with_gradients(reference_mimo_scan, cast(inputs, torch.float64))
    found = with_gradients(chunked_scan, inputs, chunk_size=16)
    errors = relative_errors(found, wanted)
    rounded = {name for name, value in found.items() if value.dtype == torch.bfloat16}
    assert rounded == {"y", "x", "z", "B", "C", "angle"}
    assert max(errors[name] for name in rounded) < 1.01 * 2**-9, errors
    assert max(errors[name] for name in found.keys() - rounded) < 1e-5, errors
