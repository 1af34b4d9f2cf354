"""A backend of megatron-core's DSA kernels (``dsa_kernels.py``): the whole of sparse attention in chunks.

Upstream imports a backend by the name of its module and asks it for hooks by their names; this one is found under
`NAME`.  It never returns None, at which upstream would compute all heads and keys without a word: what it does not
compute it refuses.

Legend: s queries (all of this context-parallel rank), t keys, b batch, n heads of this tensor-parallel rank, e channels
of queries and keys, v of latent values, i indexer heads, d indexer channels, h channels of a head's value.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from megacpp_stp.dsa.attention import sparse_attention
from megacpp_stp.dsa.bounds import Bounds
from megacpp_stp.dsa.dense_loss import dense_indexer_loss
from megacpp_stp.dsa.kl import row_weights
from megacpp_stp.dsa.selection import select_keys
from megacpp_stp.dsa.sparse_loss import sparse_indexer_loss
from megacpp_stp.errors import UserError

NAME = "chunked"
"""Of the backend, in upstream's table and in ``config.dsa_kernel_backend``."""


def run_fused_dsa_attention(
    *,
    config: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    up_v_weight: Tensor | None,
    q_indexer: Tensor,
    k_indexer: Tensor,
    indexer_weights: Tensor,
    indexer_topk: int,
    softmax_scale: float,
    loss_coeff: float,
    sparse_loss: bool,
    calculate_per_token_loss: bool,
    absorbed_mla: bool,
    cp_size: int,
    attn_mask_type: Any,
    packed_seq_params: Any,
    varlen_starts: Tensor | None,
    varlen_ends: Tensor | None,
    key_positions: Tensor | None,
    query_valid_rows: Tensor | None,
    varlen_is_plain_causal: bool,
    use_relu: bool,
    use_local_indexer_varlen: bool,
    single_packed_thd_sequence: bool,
    local_packed_cp_rank: int,
    local_packed_cp_query_start: int,
    local_packed_cp_query_len: int,
    pg_collection: Any,
) -> tuple[Tensor, Tensor | None]:
    """Upstream's hook for indexer, its loss and attention in one; arguments are upstream's.

    Args that decide: ``query`` [s, b, n, e] and ``key`` [t, b, 1, e], gathered over context parallelism;
    ``up_v_weight`` [n, h, v]; ``q_indexer`` [s, b, i, d], ``k_indexer`` [t, b, d], ``indexer_weights`` [s, b, i];
    ``varlen_starts`` and ``varlen_ends`` [s], what each query sees; ``query_valid_rows`` bool [b, s] or None;
    ``loss_coeff``, zero for no loss.  The rest says how upstream's kernels may find the same bounds faster.

    Returns:
        The result [s, b, n * h] in the dtype of the query; the indexer's loss, None without one.

    Raises:
        UserError: Attention that is not absorbed, or bounds that are no intervals.
    """
    if not absorbed_mla or value is not None or up_v_weight is None:
        raise _refused("computes absorbed MLA only", fix="use Megatron's absorbed MLA, or another kernel")
    bounds = _bounds(varlen_starts, varlen_ends, key_positions, triangular=cp_size == 1 and len(query) == len(key))
    keys, q, k, weights = key.squeeze(2), q_indexer, k_indexer, indexer_weights
    indices = select_keys(q, weights, k, topk=indexer_topk, bounds=bounds, use_relu=use_relu)
    latent, summed = sparse_attention(query, keys, indices, scale=softmax_scale, value_channels=up_v_weight.shape[-1])
    loss = None
    if loss_coeff > 0 and torch.is_grad_enabled():
        counts = row_weights(query_valid_rows, summed, coefficient=loss_coeff, per_token=calculate_per_token_loss)
        common: dict[str, Any] = {"use_relu": use_relu, "tp_group": pg_collection.tp}
        if sparse_loss:
            loss = sparse_indexer_loss(q, weights, k, indices, summed, counts, **common)
        else:
            loss = dense_indexer_loss(q, weights, k, query, keys, counts, bounds=bounds, scale=softmax_scale, **common)
    return torch.einsum("sbnv,nhv->sbnh", latent, up_v_weight).contiguous().flatten(2), loss


def _bounds(starts: Tensor | None, ends: Tensor | None, key_positions: Tensor | None, *, triangular: bool) -> Bounds:
    if starts is None or ends is None or key_positions is not None:
        raise _refused("needs the causal mask", fix="pass attn_mask_type=AttnMaskType.causal and no mask")
    return Bounds(starts=starts, ends=ends, triangular=triangular)


def _refuse_sharing(*_: object, **__: object) -> NoReturn:
    raise _refused(
        "computes the chosen keys of every layer", fix="pass --dsa-indexer-topk-freq 1, or use another kernel"
    )


# Upstream asks for these only where layers share their chosen keys.
run_fused_qk_topk = run_fused_qk_topk_with_loss = run_fused_absorbed_sparse_attention = _refuse_sharing


def _refused(problem: str, *, fix: str) -> UserError:
    return UserError(f"sparse attention in chunks {problem}", field="dsa_kernel_backend", value=NAME, fix=fix)
