"""The indexer's loss, dense and sparse, against the formula: value and gradients, rows that do not count, scales."""

import pytest
import torch

from megacpp_stp.dsa.attention import sparse_attention
from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.dense_loss import dense_indexer_loss
from megacpp_stp.dsa.kl import divergence, row_weights
from megacpp_stp.dsa.reference import reference_loss, reference_scores, reference_selection
from megacpp_stp.dsa.selection import select_keys
from megacpp_stp.dsa.sparse_loss import sparse_indexer_loss
from tests.unit.test_dsa_selection import packed

SCALE, COEFFICIENT = 0.4, 0.3
SIZES = ((1, 1, 1, 1, 1, 1, 1), (13, 3, 5, 7, 4, 3, 4), (9, 2, 2, 3, 6, 5, 20))  # s b n e i d k


def inputs(s, b, n, e, i, d, dtype=torch.float64):
    random = torch.Generator().manual_seed(100 * s + i)
    shapes = ((s, b, i, d), (s, b, i), (s, b, d), (s, b, n, e), (s, b, e))
    return [torch.randn(shape, dtype=torch.float64, generator=random).to(dtype).requires_grad_() for shape in shapes]


def loss_of(
    tensors,
    bounds,
    *,
    sparse,
    topk,
    valid=None,
    per_token=False,
    use_relu=True,
    scratch=None,
    coefficient=COEFFICIENT,
):
    """The product's loss, as `megacpp_stp.dsa.backend` puts it together."""
    q, weights, k, query, key = tensors
    indices = select_keys(q, weights, k, topk=topk, bounds=bounds, use_relu=use_relu)
    _, summed = sparse_attention(query, key, indices, scale=SCALE, value_channels=1)
    counts = row_weights(valid, summed, coefficient=coefficient, per_token=per_token)
    common = {"use_relu": use_relu, "scratch_bytes": scratch}
    if sparse:
        return sparse_indexer_loss(q, weights, k, indices, summed, counts, **common)
    return dense_indexer_loss(q, weights, k, query, key, counts, bounds=bounds, scale=SCALE, **common)


def wanted_of(tensors, bounds, *, sparse, topk, valid=None, per_token=False, use_relu=True):
    q, weights, k, query, key = tensors
    scores = reference_scores(q, weights, k, use_relu=use_relu)
    compared = reference_selection(scores, bounds, topk=topk if sparse else scores.shape[-1])
    return reference_loss(
        scores, query, key, compared, scale=SCALE, coefficient=COEFFICIENT, valid_rows=valid, per_token=per_token
    )


@pytest.mark.parametrize("scratch", [1, 3000, None])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("s", "b", "n", "e", "i", "d", "k"), SIZES)
def test_value_and_gradients_equal_the_formula(s, b, n, e, i, d, k, sparse, scratch):
    valid = torch.rand(b, s, generator=torch.Generator().manual_seed(4)) < 0.7
    documents = packed(s) if s < 5 else packed(2, 1, s - 3)
    for bounds, rows, per_token, use_relu in (
        (Bounds.causal(s), None, False, True),
        (documents, valid, False, True),
        (documents, valid, True, False),
    ):
        tensors = inputs(s, b, n, e, i, d)
        settings = {"sparse": sparse, "topk": k, "valid": rows, "per_token": per_token, "use_relu": use_relu}
        ours = loss_of(tensors, bounds, scratch=scratch, **settings)
        wanted = wanted_of(tensors, bounds, **settings)
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)  # target.clamp(1e-10) under the logarithm
        found = torch.autograd.grad(2.5 * ours, tensors[:3])
        for one, other in zip(found, torch.autograd.grad(2.5 * wanted, tensors[:3]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sparse", [True, False])
def test_gradcheck(sparse):
    *indexer, query, key = inputs(6, 2, 3, 4, 3, 2)
    fixed = [one.detach() for one in indexer]
    bounds = Bounds.causal(6)
    indices = select_keys(*fixed, topk=3, bounds=bounds)

    def loss(q, weights, k):
        _, summed = sparse_attention(query.detach(), key.detach(), indices, scale=SCALE, value_channels=1)
        counts = row_weights(None, summed, coefficient=COEFFICIENT, per_token=False)
        if sparse:
            return sparse_indexer_loss(q, weights, k, indices, summed, counts, scratch_bytes=600)
        return dense_indexer_loss(q, weights, k, query, key, counts, bounds=bounds, scale=SCALE, scratch_bytes=600)

    assert torch.autograd.gradcheck(loss, indexer)


@pytest.mark.parametrize("sparse", [True, False])
def test_only_the_indexer_gets_a_gradient(sparse):
    tensors = inputs(7, 1, 2, 3, 4, 2)
    loss = loss_of(tensors, Bounds.causal(7), sparse=sparse, topk=3)
    assert torch.autograd.grad(loss, tensors, allow_unused=True)[3:] == (None, None)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_query_that_sees_nothing_adds_nothing(sparse):
    ends = torch.arange(1, 10)
    bounds = Bounds(starts=torch.where(ends % 4 == 0, 99, 0), ends=ends, triangular=True)
    tensors = inputs(9, 2, 3, 4, 5, 2)
    ours, wanted = (run(tensors, bounds, sparse=sparse, topk=3) for run in (loss_of, wanted_of))
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)
    gradients = [torch.autograd.grad(loss, tensors[:3]) for loss in (ours, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert (gradients[0][0][ends % 4 == 0] == 0).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_without_a_valid_row_the_loss_is_zero(sparse):
    tensors = inputs(5, 2, 2, 3, 3, 2)
    loss = loss_of(tensors, Bounds.causal(5), sparse=sparse, topk=3, valid=torch.zeros(2, 5, dtype=torch.bool))
    assert loss == 0
    assert all((one == 0).all() for one in torch.autograd.grad(loss, tensors[:3]))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_keep_their_size(dtype, sparse):
    """A loss scale as in fp16 training, over a coefficient that fp16 alone would flush to zero."""
    exact, low = inputs(21, 2, 3, 8, 6, 4), inputs(21, 2, 3, 8, 6, 4, dtype=dtype)
    with torch.no_grad():
        for one, other in zip(exact, low, strict=True):
            one.copy_(other)
    found = []
    for tensors in (exact, low):
        loss = loss_of(tensors, Bounds.causal(21), sparse=sparse, topk=5, coefficient=1e-6)
        assert loss.dtype == torch.promote_types(tensors[0].dtype, torch.float32)
        found.append(torch.autograd.grad(loss * 65536.0, tensors[:3]))
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == dtype
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_kept_for_the_backward_pass_are_three_gradients():
    tensors = inputs(40, 1, 4, 8, 3, 2, dtype=torch.float32)
    for sparse in (True, False):
        kept = []
        indexer = list(tensors[:3])
        with torch.autograd.graph.saved_tensors_hooks(lambda one, kept=kept: kept.append(one) or one, lambda one: one):
            q, weights, k, query, key = tensors
            indices = select_keys(q, weights, k, topk=5, bounds=Bounds.causal(40))
            summed = torch.ones(1, 40, 5)
            counts = torch.ones(1, 40)
            if sparse:
                sparse_indexer_loss(q, weights, k, indices, summed, counts)
            else:
                dense_indexer_loss(q, weights, k, query, key, counts, bounds=Bounds.causal(40), scale=SCALE)
        assert sorted(one.numel() for one in kept) == sorted(one.numel() for one in indexer)


def test_hidden_keys_stay_out_of_very_large_scores():
    """The lowest finite number less a large score overflows."""
    scores, hidden = torch.tensor([[1e34, 5.0, 1e34]]), torch.tensor([[False, True, False]])
    value, grad = divergence(torch.tensor([[0.5, 0.0, 0.5]]), scores, hidden)
    assert value.tolist() == [0.0]
    assert grad.tolist() == [[0.0, 0.0, 0.0]]
