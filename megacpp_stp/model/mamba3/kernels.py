"""The authors' Mamba-3 kernels behind our scan's signature: names, layouts and dtypes, no arithmetic of ours.

Source: ``mamba_ssm/ops/triton/mamba3/mamba3_siso_combined.py`` of state-spaces/mamba, 2.3.2.  Theirs is batch-first,
calls C and B queries and keys, takes the decay in one factor with the step, the trapezoid's weight before its sigmoid
and the rates a head; it rounds x, z, B, C, the trapezoid and the rates to bf16, and keeps angles and, for its backward,
states in bf16.  The rest is fp32.

Legend: s sequence, b batch, H heads, P channels of a head, N state channels, S rotated pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.mamba3.chunked import CHUNK_SIZE, chunked_scan
from megacpp_stp.model.mamba3.inputs import ScanInputs

_OP = ("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined", "mamba3_siso_combined")
_FIX = "use kernel torch"


def mamba_ssm_scan(inputs: ScanInputs, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """`chunked_scan` by the authors' kernels, forward and backward; on a GPU, in bf16.

    Args:
        inputs: The recurrence's inputs of one input and output a head; x in bf16.
        chunk_size: Steps of their chunk.

    Returns:
        y, [s, b, H, P], bf16.

    Raises:
        UserError: What the kernels cannot take.
        BuildError: mamba-ssm is missing or has no such kernels.
    """
    _refuse(inputs, chunk_size)
    y = _authors_op()(
        Q=_batch_first(inputs.C),
        K=_batch_first(inputs.B),
        V=_batch_first(inputs.x),
        ADT=_steps_last(inputs.log_decay),
        DT=_steps_last(inputs.dt),
        Trap=_steps_last(_before_sigmoid(inputs.trap)),
        Q_bias=inputs.C_bias,
        K_bias=inputs.B_bias,
        Angles=_rates(inputs),
        D=inputs.D,
        Z=_batch_first(inputs.z),
        chunk_size=chunk_size,
    )
    return y.transpose(0, 1)


MAMBA3_SCANS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"torch": chunked_scan, "mamba-ssm": mamba_ssm_scan}
)
"""By the recipe's name of the kernel."""


def _authors_op() -> Callable[..., Tensor]:
    module, name = _OP
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BuildError(
            f"mamba-ssm's Mamba-3 kernels cannot be imported: {error}",
            field="--nam-mamba3-kernel",
            value="mamba-ssm",
            fix=f"pip install --no-build-isolation 'megacpp-stp[ssm]', or {_FIX}",
        ) from error


def _refuse(inputs: ScanInputs, chunk_size: int) -> None:
    """What `megacpp_stp.plan.kernels` refuses of a recipe, of tensors."""
    s, _, H, P = inputs.x.shape
    if inputs.x.dtype != torch.bfloat16:
        # They would take it, and round it.
        raise UserError("mamba-ssm's kernels compute in bf16", field="x", value=inputs.x.dtype, fix=_FIX)
    if inputs.mimo_x is not None:
        raise UserError("is not for these kernels", field="mimo_rank", value=inputs.mimo_x.shape[1], fix=_FIX)
    for field, size in {"head_dim": P, "state_dim": inputs.B.shape[-1], "chunk_size": chunk_size}.items():
        if size < 16 or size & (size - 1):
            raise UserError("mamba-ssm's kernels take powers of 2 from 16", field=field, value=size, fix=_FIX)
    if H % 4 and s % 4:
        raise UserError(
            f"mamba-ssm's backward kernel reads misaligned addresses with {H} heads", field="s", value=s, fix=_FIX
        )


def _batch_first(steps: Tensor) -> Tensor:
    """[s, b, ...] to [b, s, ...], contiguous: their descriptors want rows at multiples of 16 bytes."""
    return steps.transpose(0, 1).contiguous()


def _steps_last(steps: Tensor) -> Tensor:
    """[s, b, H] to [b, H, s]."""
    return steps.permute(1, 2, 0)


def _before_sigmoid(trap: Tensor) -> Tensor:
    """What the sigmoid makes `trap` of.

    fp32's ends have no finite one; the numbers next to them stand in, and there the sigmoid's slope is 0 either way.
    """
    info = torch.finfo(trap.dtype)
    inside = trap.clamp(info.tiny, 1 - info.eps / 2)
    return inside.log() - torch.log1p(-inside)


def _rates(inputs: ScanInputs) -> Tensor:
    """[b, s, H, S]: the same for each head; without rotation two pairs that stand still, since none is not taken."""
    s, b, H, _ = inputs.x.shape
    rates = inputs.x.new_zeros(s, b, 2) if inputs.angle is None else inputs.angle
    return rates.transpose(0, 1).unsqueeze(2).expand(b, s, H, rates.shape[-1]).to(inputs.compute_dtype)
