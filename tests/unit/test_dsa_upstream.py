"""The hook against upstream's own plain path on the real megatron-core: result, loss, gradients, chosen sets."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.experimental_attention_variant import dsa, dsa_kernels, dsa_layout, dsa_masking

from megacpp_stp.dsa import backend
from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.selection import select_keys
from megacpp_stp.errors import UserError

SCALE, COEFFICIENT, LATENT, ROTARY = 0.4, 0.7, 7, 5
ONE_RANK = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    s: int = 37
    t: int = 37
    b: int = 3
    n: int = 5
    i: int = 9
    d: int = 6
    topk: int = 8
    sparse: bool = False
    per_token: bool = False
    padded: bool = False
    use_relu: bool = True
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    cp: int = 1

    def bounds(self):
        ends = torch.arange(1, self.s + 1) if self.ends is None else torch.tensor(self.ends)
        return (torch.zeros_like(ends) if self.starts is None else torch.tensor(self.starts)), ends

    def valid(self):
        return torch.rand(self.b, self.s, generator=torch.Generator().manual_seed(5)) < 0.7 if self.padded else None

    def leaves(self, dtype=torch.float32):
        random = torch.Generator().manual_seed(self.s)
        width = LATENT + ROTARY
        shapes = {
            "query": (self.s, self.b, self.n, width),
            "key": (self.t, self.b, 1, width),
            "up_v_weight": (self.n, 4, LATENT),
            "q_indexer": (self.s, self.b, self.i, self.d),
            "k_indexer": (self.t, self.b, self.d),
            "indexer_weights": (self.s, self.b, self.i),
        }
        return {name: torch.randn(shape, generator=random).to(dtype).requires_grad_() for name, shape in shapes.items()}


def packed(*lengths):
    documents = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    starts, ends = dsa_masking.generate_varlen_mask_params(documents)
    return {"s": sum(lengths), "t": sum(lengths), "starts": tuple(starts.tolist()), "ends": tuple(ends.tolist())}


def zigzag(rank, cp=2, t=40):
    rows = dsa_layout.build_zigzag_cp_local_positions(t, cp, rank, torch.device("cpu"))
    return {"s": len(rows), "t": t, "ends": tuple((rows + 1).tolist()), "cp": cp}


def by_hook(case, leaves, **changes):
    starts, ends = case.bounds()
    arguments = {
        **leaves,
        **{"config": None, "value": None, "indexer_topk": case.topk, "softmax_scale": SCALE},
        **{"loss_coeff": COEFFICIENT, "sparse_loss": case.sparse, "calculate_per_token_loss": case.per_token},
        **{"absorbed_mla": True, "cp_size": case.cp, "attn_mask_type": None, "packed_seq_params": None},
        **{"varlen_starts": starts, "varlen_ends": ends, "key_positions": None, "query_valid_rows": case.valid()},
        **{"varlen_is_plain_causal": False, "use_relu": case.use_relu, "use_local_indexer_varlen": False},
        **{"single_packed_thd_sequence": False, "local_packed_cp_rank": 0, "local_packed_cp_query_start": 0},
        **{"local_packed_cp_query_len": case.s, "pg_collection": ONE_RANK},
    }
    return backend.run_fused_dsa_attention(**{**arguments, **changes})


def by_upstream(case, leaves):
    """As `DSAttention.forward` calls its plain path."""
    starts, ends = case.bounds()
    query, key, up_v, q, k, weights = leaves.values()
    indices, loss = dsa.FusedDSAIndexerLoss.apply(
        *(q, weights, k, query.detach(), key.detach().expand(-1, -1, case.n, -1), SCALE, case.topk, COEFFICIENT),
        *(None, case.sparse, ONE_RANK, starts, ends, None, case.valid(), case.per_token, case.use_relu),
    )
    mixed = dsa._unfused_absorbed_dsa_fn(query, key, indices, SCALE, LATENT, varlen_starts=starts, varlen_ends=ends)
    return torch.einsum("sbhc,hdc->sbhd", mixed, up_v).flatten(2), loss, indices


def relative(ours, wanted):
    ours, wanted = ours.detach().double(), wanted.detach().double()
    return float((ours - wanted).norm() / wanted.norm())


CASES = {
    "causal": {},
    "fewer keys than top-k": {"s": 5, "t": 5},
    "one token": {"s": 1, "t": 1, "topk": 1},
    "packed": packed(9, 1, 14, 5),
    "packed and padded": {**packed(9, 1, 14, 5), "padded": True},
    "sum over tokens": {"per_token": True, "padded": True},
    "no relu": {"use_relu": False},
    "first of two context-parallel ranks": zigzag(0),
    "second of two context-parallel ranks": zigzag(1),
}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", CASES)
def test_everything_equals_upstream(name, sparse):
    case = Case(**CASES[name], sparse=sparse)
    results = []
    for run in (by_hook, by_upstream):
        leaves = case.leaves()
        out, loss = run(case, leaves)[:2]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
        gradients = torch.autograd.grad((out * cotangent).sum() + 3.0 * loss, list(leaves.values()))
        results.append([out, loss, *gradients])
    starts, ends = case.bounds()
    query, _, _, q, k, weights = case.leaves().values()
    bounds = Bounds(starts=starts, ends=ends, triangular=case.cp == 1)
    chosen = select_keys(q, weights, k, topk=case.topk, bounds=bounds, use_relu=case.use_relu)
    theirs = by_upstream(case, case.leaves())[2]
    assert torch.equal(chosen.sort(-1).values, theirs.int().sort(-1).values)
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        if other.abs().max() < 1e-7:  # one key alone leaves the indexer nothing to learn
            assert one.abs().max() < 1e-6
        else:
            assert relative(one, other) < 1e-6


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_bf16_is_no_further_from_fp64_than_upstream(sparse):
    case = Case(s=65, t=65, sparse=sparse, topk=65)  # all keys: rounding changes no choice
    cotangent = torch.randn(65, 3, 20, generator=torch.Generator().manual_seed(6)).bfloat16()

    def results(run, leaves):
        out, loss = run(case, leaves)[:2]
        gradients = torch.autograd.grad(
            [out, loss], list(leaves.values()), [cotangent.to(out.dtype), loss.new_ones(())]
        )
        return [out, loss, *gradients]

    low = case.leaves(torch.bfloat16)
    exact = results(by_hook, {name: one.detach().double().requires_grad_() for name, one in low.items()})
    ours, theirs = results(by_hook, low), results(by_upstream, low)
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        # Both round the result to bf16 once: what is left is which neighbour they hit.
        assert relative(mine, wanted) < 1.1 * relative(other, wanted) + 1e-6


def test_without_a_loss_there_is_none():
    case = Case()
    out, loss = by_hook(case, case.leaves(), loss_coeff=0.0)
    assert loss is None
    with torch.no_grad():
        again, loss = by_hook(case, case.leaves())
    assert loss is None
    assert torch.equal(out, again)


def test_the_hooks_are_what_upstream_calls():
    for name in dsa_kernels.__all__:
        if name.startswith("run_"):
            assert callable(getattr(backend, name)), name
    theirs = inspect.signature(dsa_kernels.run_fused_dsa_attention).parameters
    ours = inspect.signature(backend.run_fused_dsa_attention).parameters
    assert list(ours) == list(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absorbed_mla": False}, "absorbed MLA only"),
        ({"value": torch.zeros(1)}, "absorbed MLA only"),
        ({"up_v_weight": None}, "absorbed MLA only"),
        ({"varlen_starts": None, "varlen_ends": None}, "the causal mask"),
        ({"key_positions": torch.arange(37)}, "the causal mask"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    """And not left to upstream, which would take None for a reason to compute all heads and keys."""
    case = Case()
    with pytest.raises(UserError, match=message) as caught:
        by_hook(case, case.leaves(), **changes)
    assert caught.value.fix


@pytest.mark.parametrize(
    "name", ["run_fused_qk_topk", "run_fused_qk_topk_with_loss", "run_fused_absorbed_sparse_attention"]
)
def test_shared_keys_are_refused(name):
    with pytest.raises(UserError, match="of every layer"):
        getattr(backend, name)(1, two=2)
