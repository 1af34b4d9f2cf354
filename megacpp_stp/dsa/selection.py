"""The keys that the indexer chooses: scores and top-k in chunks of queries.

Source: DeepSeek-V3.2-Exp's report, section 2.1; megatron-core's ``dsa.py``, ``fused_qk_topk_naive``.  The score of a
key for a query is sum over indexer heads of w * relu(q . key).  **Ties**: of keys with equal scores the earlier ones
are chosen, whatever the chunks, the device and the layout.  Upstream leaves ties to ``torch.topk``, which does not
say.

Legend: s queries, t keys, b batch, i indexer heads, d indexer channels, k chosen keys, r queries of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.chunks import compute_dtype, row_chunks, scratch_of


@torch.no_grad()
def select_keys(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    *,
    topk: int,
    bounds: Bounds,
    use_relu: bool = True,
    scratch_bytes: int | None = None,
) -> Tensor:
    """The ``topk`` keys with the highest scores of each query, among those that it sees.

    Args:
        q: [s, b, i, d], the indexer's queries.
        weights: [s, b, i], of the heads.
        k: [t, b, d], the indexer's keys.
        topk: Keys to choose.
        bounds: What each query sees.
        use_relu: Whether negative products count as zero.
        scratch_bytes: What may be taken at a time; by device when None.

    Returns:
        int32 [b, s, min(topk, t)]: positions of keys, best first; -1 where a query sees fewer.
    """
    s, b, i, _ = q.shape
    t, dtype = k.shape[0], compute_dtype(q.dtype)
    chosen = min(topk, t)
    keys = k.to(dtype)
    indices = q.new_full((b, s, chosen), -1, dtype=torch.int32)
    per_row = b * t * (i * dtype.itemsize + 4 * dtype.itemsize)
    for rows in row_chunks(s, bytes_per_row=per_row, scratch_bytes=scratch_bytes or scratch_of(q.device)):
        count = bounds.key_count(rows, t)
        heads = head_scores(q[rows].to(dtype), keys[:count], use_relu=use_relu)
        scores = weigh_heads(heads, weights[rows].to(dtype))
        scores.masked_fill_(bounds.hidden(rows, count), -torch.inf)
        indices[:, rows, :count] = best_positions(scores, min(chosen, count))
    return indices


def head_scores(q: Tensor, k: Tensor, *, use_relu: bool) -> Tensor:
    """Products of queries [r, b, i, d] and keys [t, b, d], one a head: [b, r, i, t]; negative ones as zero if asked."""
    r, b, i, d = q.shape
    rows = q.transpose(0, 1).reshape(b, r * i, d)
    heads = torch.bmm(rows, k.permute(1, 2, 0))
    if use_relu:
        heads.relu_()
    return heads.view(b, r, i, -1)


def weigh_heads(heads: Tensor, weights: Tensor) -> Tensor:
    """Sum [b, r, i, t] over heads with ``weights`` [r, b, i]: [b, r, t]."""
    return torch.matmul(weights.transpose(0, 1).unsqueeze(2), heads).squeeze(2)


def best_positions(scores: Tensor, k: int) -> Tensor:
    """The ``k`` highest of ``scores`` [..., t], of equal ones the earliest: int64 [..., k], -1 for a score of -inf."""
    values, positions = scores.topk(k, dim=-1)
    last = values[..., -1:]
    above = values > last
    # The n-th place among those equal to the last is the n-th such key from the left.
    counted = (scores == last).cumsum(dim=-1, dtype=torch.int32)
    places = torch.arange(1, k + 1, device=scores.device, dtype=torch.int32) - above.sum(dim=-1, keepdim=True)
    # NaN equals nothing, so its place is beyond the last; any key will do, the result is NaN all the same.
    earliest = torch.searchsorted(counted, places.to(torch.int32)).clamp_(max=scores.shape[-1] - 1)
    return torch.where(above, positions, earliest).masked_fill_(values == -torch.inf, -1)
