"""What a GPU needs of sparse attention: no value is looked at on the host, no large tensor, capture into a graph."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megacpp_stp.dsa.attention import sparse_attention
from megacpp_stp.dsa.backend import run_fused_dsa_attention
from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.dense_loss import dense_indexer_loss
from megacpp_stp.dsa.kl import row_weights
from megacpp_stp.dsa.selection import select_keys
from megacpp_stp.dsa.sparse_loss import sparse_indexer_loss

S, B, N, LATENT, ROTARY, INDEXERS, WIDTH, TOPK, CHANNELS = 96, 2, 8, 6, 2, 8, 4, 8, 5


def leaves(device="cpu", s=S, dtype=torch.float32):
    random = torch.Generator().manual_seed(8)
    width = LATENT + ROTARY
    shapes = {
        "query": (s, B, N, width),
        "key": (s, B, 1, width),
        "up_v_weight": (N, CHANNELS, LATENT),
        "q_indexer": (s, B, INDEXERS, WIDTH),
        "k_indexer": (s, B, WIDTH),
        "indexer_weights": (s, B, INDEXERS),
    }
    return {
        name: torch.randn(shape, generator=random).to(device=device, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(tensors, *, sparse, ends):
    """Forward and backward through the hook; gradients of all inputs."""
    out, loss = run_fused_dsa_attention(
        **tensors,
        **{"config": None, "value": None, "indexer_topk": TOPK, "softmax_scale": 0.5, "loss_coeff": 0.1},
        **{"sparse_loss": sparse, "calculate_per_token_loss": False, "absorbed_mla": True, "attn_mask_type": None},
        **{"packed_seq_params": None, "varlen_starts": torch.zeros_like(ends), "varlen_ends": ends},
        **{"key_positions": None, "query_valid_rows": torch.ones_like(ends)[None].bool(), "use_relu": True},
        **{"varlen_is_plain_causal": True, "use_local_indexer_varlen": False, "single_packed_thd_sequence": False},
        **{"local_packed_cp_rank": 0, "local_packed_cp_query_start": 0, "local_packed_cp_query_len": S},
        **{"pg_collection": SimpleNamespace(tp=SimpleNamespace(size=lambda: 1)), "cp_size": 1},
    )
    return out, loss, torch.autograd.grad(out.square().sum() + loss, list(tensors.values()))


@pytest.mark.parametrize("sparse", [True, False])
def test_no_value_is_looked_at_on_the_host(sparse):
    """Fake tensors have shapes and no values: a look at one, or a shape that follows from one, raises."""
    with FakeTensorMode():
        tensors = leaves()
        out, loss, grads = run(tensors, sparse=sparse, ends=torch.arange(1, S + 1))
    assert out.shape == (S, B, N * CHANNELS)
    assert loss.shape == ()
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors.values()]


def test_everything_is_where_the_inputs_are():
    """On a GPU that is not there: autograd's engine would ask for it, so the backward functions are called here."""
    with FakeTensorMode():
        tensors = leaves("cuda")
        query, key, _, q, k, weights = tensors.values()
        bounds = Bounds.causal(S, device="cuda")
        indices = select_keys(q, weights, k, topk=TOPK, bounds=bounds)
        out, summed = sparse_attention(query, key.squeeze(2), indices, scale=0.5, value_channels=LATENT)
        counts = row_weights(None, summed, coefficient=0.1, per_token=False)
        sparse = sparse_indexer_loss(q, weights, k, indices, summed, counts)
        dense = dense_indexer_loss(q, weights, k, query, key.squeeze(2), counts, bounds=bounds, scale=0.5)
        gradients = [
            *out.grad_fn.apply(torch.empty_like(out), None),
            *sparse.grad_fn.apply(sparse),
            *dense.grad_fn.apply(dense),
        ]
    assert {one.device.type for one in (indices, out, summed, sparse, dense)} == {"cuda"}
    assert [one.device.type for one in gradients if one is not None] == ["cuda"] * 8


class Live(TorchDispatchMode):
    """Bytes of all storages that operations make, at their highest, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = size
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize("sparse", [True, False])
def test_what_is_taken_is_a_scratch_and_what_grows_with_the_sequence(monkeypatch, sparse):
    scratch, s = 2**19, 1024
    monkeypatch.setattr("megacpp_stp.dsa.chunks.CPU_SCRATCH", scratch)
    tensors = leaves(s=s)
    with Live() as live:
        run(tensors, sparse=sparse, ends=torch.arange(1, s + 1))
    # Nothing of all queries and keys: not of one head, not as one bit.
    assert live.largest < B * s * s
    chosen = B * s * TOPK * (4 + 3 * 4)
    assert live.peak < scratch + chosen + 4 * sum(tensor.nbytes for tensor in tensors.values())


def test_no_product_beyond_the_lower_triangle():
    """In chunks of one query the work is (s + 1) / (2 s) of that over all keys."""
    query, key, _, q, k, weights = leaves().values()
    seen, counts = Bounds.causal(S), torch.ones(B, S)

    def products(bounds):
        with FlopCounterMode(display=False) as counter:
            select_keys(q, weights, k, topk=TOPK, bounds=bounds, scratch_bytes=1)
            dense_indexer_loss(q, weights, k, query, key.squeeze(2), counts, bounds=bounds, scale=0.5, scratch_bytes=1)
        return counter.get_total_flops()

    assert products(seen) / products(replace(seen, triangular=False)) == (S + 1) / (2 * S)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sparse", [True, False])
def test_a_graph_replays_what_was_computed(sparse):
    tensors, ends = leaves("cuda"), torch.arange(1, S + 1, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run(tensors, sparse=sparse, ends=ends)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, sparse=sparse, ends=ends)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.mul_(1.3).add_(0.1)
    graph.replay()
    wanted = run(tensors, sparse=sparse, ends=ends)
    for one, other in zip((*captured[:2], *captured[2]), (*wanted[:2], *wanted[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
