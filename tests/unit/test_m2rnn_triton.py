"""The Triton kernels of the M2RNN recurrence, run by Triton's interpreter, against the plain formulas in fp64."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn.reference import reference_scan
from tests.unit.test_m2rnn_scan import NAMES, kept_bytes, long_memory, scan_inputs

pytest.importorskip("triton")

# s, N, b, H, K, V: one segment and several, whole and not, blocks larger than the sizes, equal to them, above 16.
CASES = [(1, 4, 1, 1, 1, 1), (5, 8, 2, 3, 5, 7), (9, 4, 2, 2, 16, 16), (8, 4, 1, 2, 20, 3), (7, 3, 1, 1, 3, 18)]


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function in a process in which Triton interprets: it looks at the environment when it is imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result(timeout=300)
        yield lambda function, *args: pool.submit(function, *args).result(timeout=300)


def errors(case: tuple[int, ...], dtype: Any, with_state: bool) -> dict[str, float]:
    """Largest difference of output, state and each gradient to the reference's in fp64, over the largest number."""
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    s, every, *sizes = case
    narrow = scan_inputs(s, *sizes, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found = []
    for scan, inputs, options in (
        (triton_m2rnn_scan, narrow, {"checkpoint_every": every}),
        (reference_scan, wide, {}),
    ):
        inputs = inputs if with_state else inputs[:-1]
        outputs = scan(*inputs, **options)
        generator = torch.Generator().manual_seed(5)
        seeds = [torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, seeds)])
    for x, ours in zip(narrow, found[0][2:], strict=False):
        assert ours.dtype == x.dtype
    names = ("output", "state", *NAMES)
    return {
        name: float((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max().clamp_min(1e-3))
        for name, one, other in zip(names, *found, strict=False)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_state", [True, False])
def test_kernels_equal_the_reference_forward_and_backward(interpreter, case, with_state):
    for name, error in interpreter(errors, case, torch.float32, with_state).items():
        assert error < 1e-5, (name, error)


def test_kernels_compute_in_fp32_from_bf16(interpreter):
    found = interpreter(errors, (70, 16, 1, 2, 5, 7), torch.bfloat16, True)
    for name, error in found.items():
        # The interpreter cuts bf16 off where a GPU rounds.
        assert error < (1e-5 if name in ("state", "log_forget") else 2**-7), (name, error)


def strided() -> bool:
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    inputs = scan_inputs(6, 2, 3, 5, 4, dtype=torch.float32)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    results = []
    for leaves in (inputs, turned):
        output, state = triton_m2rnn_scan(*leaves, checkpoint_every=4)
        # The gradient of a sum has strides of 0.
        results.append([output, state, *torch.autograd.grad(output.sum() + state.sum(), leaves)])
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_kernels_read_any_strides(interpreter):
    assert interpreter(strided)


def kept(s: int, every: int) -> int:
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    inputs = scan_inputs(s, 2, 3, 4, 5, dtype=torch.bfloat16)
    return kept_bytes(lambda: triton_m2rnn_scan(*inputs, checkpoint_every=every), apart=inputs)


@pytest.mark.parametrize(("s", "every", "states"), [(1, 4, 0), (4, 4, 0), (5, 4, 1), (9, 4, 2)])
def test_autograd_keeps_one_state_a_segment_beside_the_inputs(interpreter, s, every, states):
    assert interpreter(kept, s, every) == states * 2 * 3 * 4 * 5 * 4


def long_memory_of_kernels() -> tuple[float, float]:
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    return long_memory(triton_m2rnn_scan)


def test_kernels_keep_a_long_memory(interpreter):
    found, exact = interpreter(long_memory_of_kernels)
    assert found == pytest.approx(exact, rel=1e-4)


def tanh_error() -> tuple[float, float]:
    """Of the recurrence with no memory and no W, which is tanh: relative errors of small and of all arguments."""
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    x = torch.cat([torch.logspace(-6, 1.5, 150), -torch.logspace(-6, 1.5, 150)])
    ones = torch.ones(300, 1, 1)
    output, _ = triton_m2rnn_scan(ones, ones, x[:, None, None, None], -200 * ones, torch.zeros(1, 1, 1))
    exact = x.double().tanh()
    error = ((output.flatten().double() - exact) / exact).abs()
    return float(error.max()), float(error[x.abs() < 1e-3].max())


def test_tanh_is_right_to_fp32_from_tiny_to_saturated(interpreter):
    assert max(interpreter(tanh_error)) < 3e-7


def test_fp64_and_tensors_on_a_cpu_are_refused():
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    with pytest.raises(UserError, match="computes in fp32"):
        triton_m2rnn_scan(*scan_inputs(4, 2, 3, 4, 5))
    with pytest.raises(UserError, match="needs a GPU"):
        triton_m2rnn_scan(*scan_inputs(4, 2, 3, 4, 5, dtype=torch.float32))
    with pytest.raises(UserError, match="^checkpoint_every"):
        triton_m2rnn_scan(*scan_inputs(4, 2, 3, 4, 5), checkpoint_every=0)


@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize("ones", [(), ("n", "every")], ids=["", "of one position"])
def test_kernels_compile_for_hopper_without_a_gpu_and_without_tf32(name, ones, tmp_path, monkeypatch):
    """The interpreter forgives types and shapes that the compiler does not; an argument of 1 is compiled in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megacpp_stp.model.m2rnn import triton_scan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_scan, name)
    fixed = {"B": 2, "H": 44, "K": 64, "V": 16, "BK": 64, "BV": 16, **dict.fromkeys(ones, 1)}
    fixed = {argument: value for argument, value in fixed.items() if argument in kernel.arg_names}
    narrow = {f"{tensor}_ptr" for tensor in ("q", "k", "v", "weight", "out", "grad_out", "grad_v")}

    def kind(argument: str) -> str:
        if argument.endswith("_ptr"):
            return "*bf16" if argument in narrow else "*fp32"
        return "constexpr" if argument in fixed else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    assert "tf32" not in compiled.asm["ptx"]
