"""Attention to the chosen keys against the formula: result, gradients, early queries, precision, what is kept."""

import pytest
import torch

from megacpp_stp.dsa.attention import sparse_attention
from megacpp_stp.dsa.reference import reference_attention

SCALE = 0.37


def inputs(s, b, n, e, k, t=None, dtype=torch.float64, missing=0.3):
    """Queries, keys and chosen keys: distinct, some missing; the second query has none."""
    random = torch.Generator().manual_seed(s + k)
    t = t or s
    query, key = (torch.randn(shape, dtype=dtype, generator=random) for shape in ((s, b, n, e), (t, b, e)))
    indices = torch.rand(b, s, t, generator=random).argsort(-1)[..., :k]
    indices = indices.masked_fill(torch.rand(b, s, k, generator=random) < missing, -1)
    if s > 1:
        indices[:, 1] = -1
    return query.requires_grad_(), key.requires_grad_(), indices.int()


def chosen_of(indices, t):
    mask = torch.zeros(*indices.shape[:2], t + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(indices < 0, t, indices).long(), True)[..., :t]


def both(query, key, indices, v, scratch):
    ours, summed = sparse_attention(query, key, indices, scale=SCALE, value_channels=v, scratch_bytes=scratch)
    chosen = chosen_of(indices, key.shape[0])
    return ours, reference_attention(query, key, chosen, scale=SCALE, value_channels=v), summed


@pytest.mark.parametrize("scratch", [1, 4000, None])
@pytest.mark.parametrize(
    ("s", "b", "n", "e", "v", "k", "t"), [(1, 1, 1, 1, 1, 1, 1), (11, 3, 5, 7, 4, 6, 11), (6, 2, 3, 5, 5, 9, 17)]
)
def test_result_and_gradients_equal_the_formula(s, b, n, e, v, k, t, scratch):
    query, key, indices = inputs(s, b, n, e, k, t)
    ours, wanted, _ = both(query, key, indices, v, scratch)
    assert ours.shape == (s, b, n, v)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(ours, (query, key), cotangent)
    for one, other in zip(found, torch.autograd.grad(wanted, (query, key), cotangent), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    query, key, indices = inputs(5, 2, 3, 4, 3)
    assert torch.autograd.gradcheck(
        lambda q, k: sparse_attention(q, k, indices, scale=SCALE, value_channels=2, scratch_bytes=700)[0], (query, key)
    )


def test_the_probabilities_are_summed_over_heads_and_have_no_gradient():
    query, key, indices = inputs(7, 2, 3, 4, 5)
    _, _, summed = both(query, key, indices, 4, 900)
    assert not summed.requires_grad
    assert summed.shape == indices.shape
    scores = torch.einsum("sbne,tbe->bnst", query, key) * SCALE
    mask = chosen_of(indices, 7)
    chances = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum(1)
    wanted = chances.gather(-1, indices.clamp_min(0).long()).masked_fill(indices < 0, 0.0)
    torch.testing.assert_close(summed, wanted, rtol=1e-12, atol=1e-12)


def test_a_query_without_keys_gives_zero_and_passes_no_gradient():
    query, key, indices = inputs(4, 1, 2, 3, 2)
    out, _ = sparse_attention(query, key, indices, scale=SCALE, value_channels=3)
    assert (out[1] == 0).all()
    (grad_query, grad_key) = torch.autograd.grad(out[1].sum(), (query, key))
    assert (grad_query == 0).all()
    assert (grad_key == 0).all()


def test_the_order_of_the_keys_does_not_matter():
    query, key, indices = inputs(9, 2, 3, 4, 6)
    out, _ = sparse_attention(query, key, indices, scale=SCALE, value_channels=4)
    again, _ = sparse_attention(query, key, indices.flip(-1), scale=SCALE, value_channels=4)
    torch.testing.assert_close(out, again, rtol=1e-13, atol=1e-13)


def test_large_scores_do_not_overflow():
    query, key, indices = inputs(6, 1, 2, 3, 4, dtype=torch.float32)
    out, _ = sparse_attention(query * 1e4, key * 1e3, indices, scale=1.0, value_channels=3)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    query, key, indices = inputs(33, 2, 4, 8, 12)
    low = [one.detach().to(dtype).requires_grad_() for one in (query, key)]
    exact = [one.detach().double().requires_grad_() for one in low]
    cotangent = torch.randn(33, 2, 4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    out, _ = sparse_attention(*low, indices, scale=SCALE, value_channels=6)
    wanted, _ = sparse_attention(*exact, indices, scale=SCALE, value_channels=6)
    assert out.dtype == dtype
    # One rounding: of the result.
    torch.testing.assert_close(out, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    out.backward(cotangent)
    wanted.backward(cotangent.double())
    for one, other in zip(low, exact, strict=True):
        torch.testing.assert_close(one.grad, other.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    query, key, indices = inputs(64, 1, 8, 6, 5, dtype=torch.float32)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.add(one.data_ptr()) or one, lambda one: one):
        sparse_attention(query, key, indices, scale=SCALE, value_channels=4)
    assert kept == {query.data_ptr(), key.data_ptr(), indices.data_ptr()}
