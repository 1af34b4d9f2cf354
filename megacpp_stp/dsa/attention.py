"""Attention to the chosen keys, in chunks of queries, computed again in the backward pass.

Source: megatron-core's ``dsa.py``, ``_unfused_absorbed_dsa_fn``: absorbed MLA, one key head for all queries, whose
first channels are the value.  Upstream holds the scores of all keys; here each query's chosen keys are gathered.

Legend: s queries, t keys, b batch, n heads of this tensor-parallel rank, e channels of queries and keys, v of values
(the first of a key), k chosen keys, m query rows of a chunk (of all its queries and batch entries).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_stp.dsa.bounds import removal
from megacpp_stp.dsa.chunks import compute_dtype, row_chunks, scratch_of


def sparse_attention(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    *,
    scale: float,
    value_channels: int,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the chosen keys.

    Args:
        query: [s, b, n, e].
        key: [t, b, e], latent and rotary part.
        indices: Integers [b, s, k]: the keys of each query, in any order, each once; negative for none.
        scale: Multiplies the scores.
        value_channels: v.
        scratch_bytes: What may be taken at a time; by device when None.

    Returns:
        The result [s, b, n, v] in the dtype of the query, zero for a query without keys; and, without a gradient, the
        probabilities summed over heads [b, s, k] in the compute dtype.
    """
    scratch = scratch_bytes or scratch_of(query.device)
    return _SparseAttention.apply(query, key, indices, scale, value_channels, scratch)


class _SparseAttention(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, indices: Tensor, scale: float, value_channels: int, scratch_bytes: int
    ) -> tuple[Tensor, Tensor]:
        s, b, n, _ = query.shape
        table = key_table(key)
        out = query.new_empty(s, b, n, value_channels)
        summed = table.new_empty(b, s, indices.shape[-1])
        for rows in _chunks(query, indices, scratch_bytes):
            chosen = Chosen(table, indices[:, rows])
            chances = _probabilities(_rows(query[rows], table.dtype), chosen, scale)
            values = torch.bmm(chances, chosen.keys[..., :value_channels]).mul_(chosen.any)
            out[rows] = values.view(-1, b, n, value_channels)
            summed[:, rows] = chosen.by_batch(chances.sum(dim=1).masked_fill_(chosen.missing, 0.0))
        ctx.save_for_backward(query, key, indices)
        ctx.scale, ctx.scratch_bytes = scale, scratch_bytes
        ctx.mark_non_differentiable(summed)
        return out, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, indices = ctx.saved_tensors
        v = grad_out.shape[-1]
        table = key_table(key)
        grad_query, grad_table = torch.empty_like(query), torch.zeros_like(table)
        for rows in _chunks(query, indices, ctx.scratch_bytes):
            chosen = Chosen(table, indices[:, rows])
            queries, grads = _rows(query[rows], table.dtype), _rows(grad_out[rows], table.dtype) * chosen.any
            chances = _probabilities(queries, chosen, ctx.scale)
            # Softmax backwards: p * (dp - sum p dp), and the scale of the scores.
            grad_scores = torch.bmm(grads, chosen.keys[..., :v].transpose(1, 2))
            grad_scores.sub_((chances * grad_scores).sum(dim=-1, keepdim=True)).mul_(chances).mul_(ctx.scale)
            grad_query[rows] = torch.bmm(grad_scores, chosen.keys).view_as(grad_query[rows])
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)
            grad_keys[..., :v].baddbmm_(chances.transpose(1, 2), grads)
            grad_table.index_add_(0, chosen.places, grad_keys.flatten(0, 1))
        return grad_query, grad_table.view(key.shape).to(key.dtype), None, None, None, None


class Chosen:
    """The chosen keys of a chunk of queries.

    Args:
        table: [t * b, c], see `key_table`.
        indices: [b, r, k], as `sparse_attention` takes them.

    Attributes:
        keys: [m, k, c], gathered; some key where none is chosen.
        places: int64 [m * k]: their rows in the table.
        missing: bool [m, k]: where none is chosen.
        any: [m, 1, 1]: 1 for a query with a key, else 0.
    """

    def __init__(self, table: Tensor, indices: Tensor) -> None:
        self._b, r, k = indices.shape
        by_row = indices.transpose(0, 1).to(torch.int64)  # [r, b, k]
        batch = torch.arange(self._b, device=indices.device)[:, None]
        self.places = (by_row.clamp_min(0) * self._b + batch).reshape(-1)
        self.missing = (by_row < 0).reshape(r * self._b, k)
        self.any = (~self.missing).any(dim=-1).to(table.dtype)[:, None, None]
        self.keys = table.index_select(0, self.places).view(r * self._b, k, -1)

    def by_batch(self, rows: Tensor) -> Tensor:
        """[m, k] as [b, r, k]."""
        return rows.view(-1, self._b, rows.shape[-1]).transpose(0, 1)


def key_table(key: Tensor) -> Tensor:
    """Keys [t, b, c] as rows [t * b, c] in the compute dtype."""
    return key.reshape(-1, key.shape[-1]).to(compute_dtype(key.dtype))


def _rows(query: Tensor, dtype: torch.dtype) -> Tensor:
    """[r, b, n, c] as [m, n, c]."""
    return query.flatten(0, 1).to(dtype)


def _probabilities(queries: Tensor, chosen: Chosen, scale: float) -> Tensor:
    """Softmax over the chosen keys: [m, n, k]; zero where there is none, but of a query without any not yet."""
    scores = torch.bmm(queries, chosen.keys.transpose(1, 2)).mul_(scale)
    return scores.add_(removal(chosen.missing, scores.dtype).unsqueeze(1)).softmax(dim=-1)


def _chunks(query: Tensor, indices: Tensor, scratch_bytes: int) -> Any:
    """At the peak of the backward pass: keys, their gradient and the values' share; three rows of scores a head."""
    s, b, n, e = query.shape
    k, size = indices.shape[-1], compute_dtype(query.dtype).itemsize
    per_row = b * (k * (3 * e + 4 * n) * size + 2 * k * 8 + 2 * n * e * size)
    return row_chunks(s, bytes_per_row=per_row, scratch_bytes=scratch_bytes)
