"""Which code computes the M2RNN recurrence, by the recipe's name of it; the authors' op behind our scan's signature.

Source: ``xma/layers/m2rnn`` of open-lm-engine/accelerated-model-architectures (XMA, commit 384ed0a), whose op this one
calls.  It is batch-first, has a dimension of heads in queries and keys too, of 1 where all heads share them, and takes
the forget gate itself.  All its tensors have one dtype, in which it keeps the state and the gate: so it gets all of
them in fp32.  On GPUs its products are of TF32 operands unless ``TRITON_F32_DEFAULT=ieee``.

Legend: s sequence, b batch, H heads of this tensor-parallel rank, K key channels and V value channels of a head,
N positions between kept states.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.m2rnn.scan import CHECKPOINT_EVERY, check_scan_inputs, m2rnn_scan, segments

Scan = Callable[..., tuple[Tensor, Tensor]]

_OP = ("xma.layers.m2rnn.op", "m2rnn")


def xma_m2rnn_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[Tensor, Tensor]:
    """`m2rnn_scan` by the authors' op: the same arguments, results and kept states, in fp32 (fp64 for fp64).

    Their backward makes room for a state of each position of a call, so it is called once for every N positions, each
    time from the state before.  The gate is rounded to fp32 before ``1 - f``: an f closer to 1 than 6e-8 writes
    nothing.

    Raises:
        UserError: What `m2rnn_scan` refuses.
        BuildError: XMA is missing; PyPI's ``xma`` is another project.
    """
    check_scan_inputs(query, key, value, log_forget, weight, initial_state, checkpoint_every)
    op, dtype = _authors_op(), torch.promote_types(query.dtype, torch.float32)
    q, k = (x.to(dtype).transpose(0, 1).unsqueeze(2) for x in (query, key))
    v, forget = (x.to(dtype).transpose(0, 1) for x in (value, log_forget.exp()))
    state = None if initial_state is None else initial_state.to(dtype)
    transition, outputs = weight.to(dtype), []
    for at in segments(value.shape[0], checkpoint_every):
        output, state = op(q[:, at], k[:, at], v[:, at], transition, forget[:, at], input_state=state)
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs, dim=1).transpose(0, 1).to(value.dtype), state


def _triton(*tensors: Tensor | None, checkpoint_every: int = CHECKPOINT_EVERY) -> tuple[Tensor, Tensor]:
    """`triton_m2rnn_scan`, imported where it is needed."""
    from megacpp_stp.model.m2rnn.triton_scan import triton_m2rnn_scan

    return triton_m2rnn_scan(*tensors, checkpoint_every=checkpoint_every)


M2RNN_SCANS: Mapping[str, Scan] = MappingProxyType({"torch": m2rnn_scan, "triton": _triton, "xma": xma_m2rnn_scan})
"""By the recipe's name of the kernel."""


def _authors_op() -> Scan:
    module, name = _OP
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BuildError(
            f"XMA's M2RNN op cannot be imported: {error}",
            field="--nam-m2rnn-kernel",
            value="xma",
            fix="install XMA from its source (open-lm-engine/accelerated-model-architectures), or use kernel triton",
        ) from error
