"""Surface ``dsa-memory``: a row in Megatron's table of DSA kernels that leads to sparse attention in chunks.

Upstream's own path (``dsa_kernel_backend`` none) holds scores of all heads and keys, and its fused kernels are for
other sizes than NAM's.  `megacpp_stp.dsa.backend` computes the same in chunks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.patches.contract import Hits, Plan, Probe, ProbeFailed, Replacement, Surface

_KERNELS = "megatron.core.transformer.experimental_attention_variant.dsa_kernels"
_UPSTREAM = "megatron.core.transformer.experimental_attention_variant.dsa"
_BACKEND = "megacpp_stp.dsa.backend"
_NAME = "chunked"  # as megacpp_stp.dsa.backend.NAME, which needs torch
_TARGET = f"{_KERNELS}:_BACKEND_MODULE_NAME_BY_BACKEND[{_NAME}]"
_CONSUMER = f"{_KERNELS}:_get_backend_module_name"
_FIELD = "model.families.A.sparse.kernel"
_TOLERANCE = 1e-5
"""Relative, of fp32 results that are summed in another order; measured: below 3e-7."""


def _unneeded(plan: Plan) -> str | None:
    if not any(layer["kind"] == "dsa" for layer in plan["layout"]["layers"]):
        return "no layer of it has sparse attention"
    kernel = plan["recipe"]["model"]["families"]["A"]["sparse"].get("kernel", "upstream")
    return None if kernel == _NAME else f"{_FIELD} is {kernel!r}, which is Megatron's own"


def _replace(_: Mapping[str, Any], hits: Hits) -> dict[str, Replacement]:
    """Upstream imports a backend by its module's name; so its functions, counted, are a module of their own."""
    backend = importlib.import_module(_BACKEND)
    counted = ModuleType(f"{_BACKEND}.counted_{id(hits):x}")
    for name, value in vars(backend).items():
        if name.startswith("run_fused_"):
            setattr(counted, name, _counting(value, hits))
    return {_TARGET: Replacement(value=counted)}


def _counting(hook: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    @functools.wraps(hook)
    def counting(*args: Any, **kwargs: Any) -> Any:
        hits.add(_CONSUMER)
        return hook(*args, **kwargs)

    return counting


def _configure(config: Any) -> None:
    """Choose the row; no argument of Megatron's can, since its parser knows its own backends only.

    Raises:
        UserError: The configuration asks for other kernels, for none, or for what this one does not compute.
    """
    if config.dsa_kernel_backend not in ("none", _NAME):
        raise _contradicted("--dsa-kernel-backend", config.dsa_kernel_backend, fix="leave --dsa-kernel-backend out")
    # An enum, or its name.
    if "unfused" in (config.attention_backend, getattr(config.attention_backend, "name", None)):
        raise _contradicted("--attention-backend", "unfused", fix="leave --attention-backend out")
    if (config.dsa_indexer_topk_freq or 1) > 1:
        raise _contradicted(
            "--dsa-indexer-topk-freq", config.dsa_indexer_topk_freq, fix="pass 1: each layer chooses its own keys"
        )
    config.dsa_kernel_backend = _NAME


def _contradicted(option: str, value: object, *, fix: str) -> UserError:
    return UserError(f"contradicts {_FIELD} {_NAME!r}", field=option, value=value, fix=f"{fix}, or use kernel upstream")


def _probe(probe: Probe) -> str:
    """Through upstream's own dispatcher: result and gradients against upstream's path, with both forms of the loss."""
    if probe.through[_TARGET].keys() < {_CONSUMER}:
        raise ProbeFailed(f"{_CONSUMER} does not look into the table")
    worst = 0.0
    for sparse in (False, True):
        for name, ours, theirs in zip(_RESULTS, _computed(sparse, new=True), _computed(sparse, new=False), strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            worst = max(worst, error)
            if not error <= _TOLERANCE:
                form = "sparse" if sparse else "dense"
                raise ProbeFailed(f"{name} differs from upstream's by {error:.1e} with the {form} indexer loss")
    return (
        f"result, indexer loss and all gradients equal upstream's, dense and sparse; worst relative error {worst:.1e}"
    )


_RESULTS = (
    "result",
    "loss",
    *(f"gradient of {name}" for name in ("query", "key", "value weight", "q", "k", "weights")),
)


def _computed(sparse: bool, *, new: bool) -> list[Any]:
    """Results and gradients for small inputs without ties, by the table's new row or by upstream's plain path."""
    import torch

    s, b, n, latent, rotary, heads, width, topk, scale, coefficient = 13, 2, 3, 4, 2, 5, 6, 4, 0.4, 0.5
    random = torch.Generator().manual_seed(20)
    shapes = ((s, b, n, latent + rotary), (s, b, 1, latent + rotary), (n, 5, latent))
    indexer = ((s, b, heads, width), (s, b, width), (s, b, heads))
    leaves = [torch.randn(shape, generator=random).requires_grad_() for shape in (*shapes, *indexer)]
    query, key, up_v, q, k, weights = leaves
    ends = torch.arange(1, s + 1)
    starts, groups = torch.zeros_like(ends), SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    if new:
        out, loss = importlib.import_module(_KERNELS).run_fused_dsa_attention(
            config=SimpleNamespace(dsa_kernel_backend=_NAME, attention_backend=None),
            **{"query": query, "key": key, "value": None, "up_v_weight": up_v},
            **{"q_indexer": q, "k_indexer": k, "indexer_weights": weights, "indexer_topk": topk},
            **{"softmax_scale": scale, "loss_coeff": coefficient, "sparse_loss": sparse, "use_relu": True},
            **{"calculate_per_token_loss": False, "absorbed_mla": True, "cp_size": 1, "attn_mask_type": None},
            **{"packed_seq_params": None, "varlen_starts": starts, "varlen_ends": ends, "key_positions": None},
            **{"query_valid_rows": None, "varlen_is_plain_causal": True, "pg_collection": groups},
        )
    else:
        upstream = importlib.import_module(_UPSTREAM)
        indices, loss = upstream.FusedDSAIndexerLoss.apply(
            *(q, weights, k, query.detach(), key.detach().expand(-1, -1, n, -1), scale, topk, coefficient),
            *(None, sparse, groups, starts, ends, None, None, False, True),
        )
        mixed = upstream._unfused_absorbed_dsa_fn(
            query, key, indices, scale, latent, varlen_starts=starts, varlen_ends=ends
        )
        out = torch.einsum("sbhc,hdc->sbhd", mixed, up_v).flatten(2)
    return [out.detach(), loss.detach(), *torch.autograd.grad(out.cos().sum() + loss, leaves)]


SURFACE = Surface(id="dsa-memory", unneeded=_unneeded, replace=_replace, probe=_probe, configure=_configure)
