"""The fused linear cross entropy on a GPU: each backend against the plain reference, and nothing read back."""

import importlib.util

import pytest
import torch

from megacpp_stp.flce.backends import find_backend
from megacpp_stp.flce.chunked import Options, linear_cross_entropy
from tests.unit.test_flce import plain, problem, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"tokens": 515, "hidden": 256, "vocab": 4104}


def on_gpu(dtype, spread=0.3):
    states, weight, labels, slopes = problem(dtype=dtype, spread=spread, **SIZES)
    states, weight = (each.detach().cuda().requires_grad_() for each in (states, weight))
    return states, weight, labels.cuda(), slopes.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "cut-cross-entropy"])
def test_each_backend_is_no_worse_than_all_logits_at_once(backend, dtype):
    if backend == "cut-cross-entropy" and (
        dtype is torch.float32 or importlib.util.find_spec("cut_cross_entropy") is None
    ):
        pytest.skip("cut-cross-entropy is not installed, or not for this dtype")
    states, weight, labels, slopes = on_gpu(dtype)
    loss, _ = find_backend(backend)(states, weight, labels, Options())
    found = (loss.detach(), *torch.autograd.grad(loss, (states, weight), slopes))
    exact = [each.detach().double().requires_grad_() for each in (states, weight)]
    for value, other, truth in zip(
        found, plain(states, weight, labels, slopes), plain(*exact, labels, slopes.double()), strict=True
    ):
        assert relative(value, truth) <= 1.05 * relative(other, truth) + 1e-8


def test_it_can_be_captured_in_a_cuda_graph():
    states, weight, labels, slopes = on_gpu(torch.bfloat16)

    def step():
        loss, _ = linear_cross_entropy(states, weight, labels, Options(columns=512, with_best=True))
        return torch.autograd.grad(loss, (states, weight), slopes)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = [each.clone() for each in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for value, before in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, before)
