"""A tap on CUDA: the gradient of autograd, no wait for the device, no memory of the sequence's size."""

import pytest
import torch

from megacpp_stp.bench.stp import peak_bytes
from megacpp_stp.bench.stp_variants import NONE, SEAM, TEXTBOOK, Case, Stream, ways

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")


def gradient(case, way):
    stream = Stream(case, CUDA)
    stream.backward(stream.forward(ways(case, CUDA)[way]))
    return stream.x.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize(("length", "n_spans"), [(33, 2), (9, 8)])  # the second shares positions
def test_the_seam_adds_what_autograd_adds(length, n_spans, dtype, tolerance):
    case = Case(length=length, batch=2, width=20, n_spans=n_spans, dtype=dtype)
    found, expected = gradient(case, SEAM), gradient(case, TEXTBOOK)
    assert (expected - gradient(case, NONE)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(found, gradient(case, SEAM))


def test_a_tap_never_waits_for_the_device():
    case = Case(length=64, batch=2, width=32, n_spans=4)
    stream, way = Stream(case, CUDA), ways(case, CUDA)[SEAM]
    stream.backward(stream.forward(way))  # loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.backward(stream.forward(way))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_tap_adds_no_memory_of_the_sequences_size():
    case = Case(length=2048, batch=2, width=512, n_spans=4)
    stream, by_name = Stream(case, CUDA), ways(case, CUDA)
    peak = {name: peak_bytes(stream, by_name[name], CUDA) for name in (SEAM, NONE)}
    assert peak[SEAM] - peak[NONE] < stream.x.nbytes / 4
