"""The draw, the loss and the seam on torch_xla, where it is installed: one program for all steps, none on the host."""

import pytest
import torch

from megacpp_stp.stp.objective import stp_loss_at, stp_terms
from megacpp_stp.stp.sampler import DrawKey, draw_document_triples, draw_triples
from megacpp_stp.stp.seam import GradScale, inject

torch_xla = pytest.importorskip("torch_xla")
metrics = pytest.importorskip("torch_xla.debug.metrics")


def step(hidden, key, documents, max_span):
    if documents is None:
        triples = draw_triples(key, length=33, batch=2, n_spans=3, device=hidden.device, max_span=max_span)
        return stp_loss_at(hidden, triples, sequence_first=True), triples
    spans = draw_document_triples(key, documents, n_spans=3, max_span=max_span)
    loss = stp_loss_at(hidden, spans.positions, allowed=spans.allowed, sequence_first=True)
    return loss, spans.positions


@pytest.mark.parametrize("max_span", [None, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_one_program_serves_all_steps(packed, max_span):
    device = torch_xla.device()
    metrics.clear_all()
    for i in range(4):
        random = torch.Generator().manual_seed(i)
        hidden = torch.randn(33, 2, 16, generator=random, requires_grad=True)
        key = DrawKey(seed=1 + i, iteration=i, microbatch=i % 2, data_rank=i, layer=4 + i).as_tensor("cpu")
        documents = (torch.rand(2, 33, generator=random) < 0.15).cumsum(1) if packed else None
        loss, triples = step(hidden, key, documents, max_span)
        loss.backward()
        there = hidden.detach().to(device).requires_grad_()
        found, found_triples = step(there, key.to(device), documents.to(device) if packed else None, max_span)
        found.backward()
        torch_xla.sync()
        assert metrics.metric_data("CompileTime")[0] == 1
        assert not [name for name in metrics.counter_names() if name.startswith("aten::")]
        assert torch.equal(triples, found_triples.cpu())
        torch.testing.assert_close(found.cpu(), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(there.grad.cpu(), hidden.grad, rtol=1e-4, atol=1e-6)


def tap(hidden, key, scale):
    triples = draw_triples(key, length=33, batch=2, n_spans=3, device=hidden.device)
    index = (triples * 2 + torch.arange(2, device=hidden.device)).reshape(-1)
    rows = hidden.detach().reshape(66, 16).index_select(0, index).view(3, -1, 16)
    return inject(hidden, stp_terms(rows, tolerance=1e-7).grad.reshape(-1, 16), index, scale)


def test_one_program_serves_the_tap_of_all_steps():
    device = torch_xla.device()
    scales = {"cpu": GradScale(), "xla": GradScale(device)}
    metrics.clear_all()
    for i in range(4):
        hidden = torch.randn(33, 2, 16, generator=torch.Generator().manual_seed(i), requires_grad=True)
        key = DrawKey(seed=1 + i, iteration=i, microbatch=i % 2, data_rank=i, layer=4 + i).as_tensor("cpu")
        there = hidden.detach().to(device).requires_grad_()
        outs = tap(hidden, key, scales["cpu"]), tap(there, key.to(device), scales["xla"])
        for name, scale in scales.items():
            scale.set(torch.tensor(3.0 + i, device=device if name == "xla" else "cpu"))
        for out in outs:
            out.sum().backward()
        torch_xla.sync()
        assert metrics.metric_data("CompileTime")[0] == 1
        assert not [name for name in metrics.counter_names() if name.startswith("aten::")]
        assert (hidden.grad - 1).abs().max() > 0.01
        torch.testing.assert_close(there.grad.cpu(), hidden.grad, rtol=1e-4, atol=1e-6)
