"""The kernels of the recurrent mixers on a GPU, forward and backward, against the plain recurrences in fp64.

Sizes are the families', and the lengths odd: the last chunk and the last segment are cut.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_stp.model.m2rnn.kernels import M2RNN_SCANS
from megacpp_stp.model.m2rnn.reference import reference_scan as m2rnn_reference
from megacpp_stp.model.mamba3.chunked import chunked_scan
from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.kernels import mamba_ssm_scan
from megacpp_stp.plan.kernels import kernel_packages
from megacpp_stp.recipe import load_recipe
from tests.unit.test_m2rnn_scan import scan_inputs as m2rnn_inputs
from tests.unit.test_mamba3_scan import cast, scan_inputs, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def missing(override: str) -> bool:
    """Whether the kernel that `override` names is not installed."""
    (needed,) = kernel_packages(load_recipe("nam56r-tiny", (override,)))
    found = importlib.util.find_spec(needed.package)
    return not any(Path(place, needed.module).is_file() for place in (found and found.submodule_search_locations) or ())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


# --- Mamba-3 --------------------------------------------------------------------------------------


def on_device(inputs: ScanInputs) -> ScanInputs:
    return replace(inputs, **{name: t.detach().cuda().requires_grad_() for name, t in inputs.tensors().items()})


@pytest.mark.skipif(missing("model.families.M.kernel=mamba-ssm"), reason="mamba-ssm is not installed")
@pytest.mark.parametrize(("G", "S"), [(1, 32), (2, 16), (8, 32), (2, 0)])
@pytest.mark.parametrize(("s", "N"), [(256, 128), (301, 64)])
def test_mamba_ssm_equals_the_recurrence(s, N, G, S):
    """In bf16, and no further from the truth than our own scan by more than what the kernels round besides.

    They round the decayed keys and queries, the trapezoid, the angles and the states to bf16, so the bound is the
    authors' own, a few times their rounding; a transposed or swapped input is off by its own size.
    """
    fp32 = dict.fromkeys(("dt", "log_decay", "trap", "B_bias", "C_bias", "D"), torch.float32)
    wide = scan_inputs(s, b=2, H=8, P=64, G=G, N=N, S=S)
    calm = replace(wide, **{name: (0.1 * getattr(wide, name)).detach() for name in ("dt", "log_decay")})
    inputs = on_device(cast(calm, torch.bfloat16, **fp32))
    # Chunks in fp64, which the unit tests hold to the recurrence step by step.
    wanted = with_gradients(chunked_scan, cast(inputs, torch.float64))
    found = with_gradients(mamba_ssm_scan, inputs, chunk_size=64)
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    assert {name: value.dtype for name, value in found.items()} == {
        "y": torch.bfloat16,
        **{name: tensor.dtype for name, tensor in inputs.tensors().items()},
    }
    assert errors["y"] < 0.02, errors
    assert max(errors.values()) < 0.1, errors


# --- M2RNN ----------------------------------------------------------------------------------------


def m2rnn_errors(kernel: str, dtype: torch.dtype, *, s: int, every: int) -> dict[str, float]:
    names = ("output", "state", "query", "key", "value", "log_forget", "weight", "initial_state")
    made = m2rnn_inputs(s, 2, 5, 64, 16, dtype=dtype)
    # A transition that does not blow the state up over hundreds of steps, as at the start of training.
    made[4] = (torch.eye(16) + 0.1 * (made[4].detach() - torch.eye(16))).to(dtype)
    narrow = [x.detach().cuda().requires_grad_() for x in made]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found: list[Any] = []
    for scan, inputs, options in (
        (M2RNN_SCANS[kernel], narrow, {"checkpoint_every": every}),
        (m2rnn_reference, wide, {}),
    ):
        outputs = scan(*inputs, **options)
        generator = torch.Generator().manual_seed(5)
        seeds = [torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype).cuda() for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, seeds)])
    assert [x.dtype for x in found[0][2:]] == [x.dtype for x in narrow]
    return {name: relative(one, other) for name, one, other in zip(names, *found, strict=True)}


@pytest.mark.parametrize("kernel", ["torch", "triton", "xma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("s", "every"), [(1, 64), (131, 64), (64, 16)])
def test_each_m2rnn_kernel_equals_the_recurrence(kernel, dtype, s, every):
    """All compute in fp32; XMA's products are of TF32 operands, 10 bits each."""
    if kernel != "torch" and missing(f"model.families.R.kernel={kernel}"):
        pytest.skip(f"the kernel {kernel} is not installed")
    errors = m2rnn_errors(kernel, dtype, s=s, every=every)
    allowed = 1e-2 if kernel == "xma" else 2e-5
    for name, error in errors.items():
        rounded = dtype == torch.bfloat16 and name not in ("state", "log_forget")
        assert error < allowed + (2**-8 if rounded else 0), (name, errors)
