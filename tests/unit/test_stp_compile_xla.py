"""The draw and the loss on torch_xla, where it is installed: one program for all steps, nothing done on the host."""

import pytest
import torch

from megacpp_stp.stp.objective import stp_loss_at
from megacpp_stp.stp.sampler import DrawKey, draw_document_triples, draw_triples

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
