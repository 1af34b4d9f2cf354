"""What can compute the fused loss: our own operation, or a library's kernels.

A backend is chosen by name and never falls back.  It is one only if its gradient is exact for any weight of a token's
loss, with no worse an error than Megatron's own path.

Left out is liger-kernel (0.8.5 was read).  Its fused linear cross entropy with ``reduction="none"``, which is exact
since 0.8.2, rounds in 16 bits three times where Megatron does once: the slope of each logit, the weight of each
token's loss, and their product; and it has no vocabulary parallelism, and reads a number back to the host in each
call.  With ``reduction="mean"`` it makes gradients in forward, before a token's weight is known.

Letters: s sequence, b batch, h hidden, v this rank's part of the vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.flce.chunked import Best, Options, linear_cross_entropy
from megacpp_stp.flce.parallel import GatherSequence, group_rank, group_size

Loss = Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Best | None]]
"""(hidden, weight, labels, options) to losses and what ``with_best`` asks for, as `linear_cross_entropy`."""

BACKENDS = ("torch", "cut-cross-entropy")
FIELD = "training.fused_cross_entropy"
_CUT = "cut_cross_entropy"
_CUT_IGNORED = -100


def find_backend(name: str) -> Loss:
    """A backend by its name.

    Args:
        name: ``torch`` for our own operation, which runs everywhere; ``cut-cross-entropy`` for Apple's Triton kernels
            (its variant without gradient filter), in bf16 or fp16 on a GPU.

    Raises:
        UserError: No such backend, or its library is not installed or too old.
    """
    if name == "torch":
        return linear_cross_entropy
    if name != "cut-cross-entropy":
        raise UserError("is no backend", field=FIELD, value=name, fix=f"use one of {', '.join(BACKENDS)}")
    try:
        library: Any = importlib.import_module(_CUT)
        presets: Any = importlib.import_module(f"{_CUT}.cce_utils")
    except ImportError as error:
        raise UserError(
            f"needs cut-cross-entropy with its exact variant: {error}",
            field=FIELD,
            value=name,
            fix="pip install 'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy', or use torch",
        ) from error
    assert "cce_exact" in presets.CCEPresets.names
    return _CutCrossEntropy(library)


class _CutCrossEntropy:
    """Apple's kernels. A label that is no class is ignored here: loss 0, no gradient."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Best | None]:
        """As `linear_cross_entropy`.

        Raises:
            UserError: Another device, dtype or scale than its kernels are exact for.
        """
        _refuse_what_does_not_fit(hidden, options)
        size, rank = group_size(options.group), group_rank(options.group)
        flat = labels.reshape(-1).long()
        known = (flat >= 0) & (flat < size * weight.shape[0])
        if options.ignore_index is not None:
            known &= flat != options.ignore_index
        parts = None
        if size > 1:
            parts = self._library.VocabParallelOptions(
                rank * weight.shape[0],
                (rank + 1) * weight.shape[0],
                options.group,
                reduce_e_grad=not options.sequence_parallel,
            )
        whole = hidden
        if options.sequence_parallel and size > 1:
            whole = GatherSequence.apply(hidden, options.group)
        loss = self._library.linear_cross_entropy(
            whole.reshape(-1, whole.shape[-1]),
            weight,
            torch.where(known, flat, torch.full_like(flat, _CUT_IGNORED)),
            ignore_index=_CUT_IGNORED,
            reduction="none",
            impl="cce_exact",
            vocab_parallel_options=parts,
        )
        # It has no largest logit to give: whoever needs one computes it.
        return loss.view(labels.shape), None


def _refuse_what_does_not_fit(hidden: Tensor, options: Options) -> None:
    found: list[tuple[bool, str, object]] = [
        (hidden.device.type != "cuda", "runs on a GPU only", hidden.device.type),
        (hidden.dtype not in (torch.bfloat16, torch.float16), "is exact in bf16 and fp16 only", hidden.dtype),
        (options.scale != 1.0, "does not scale logits", options.scale),
    ]
    for wrong, problem, value in found:
        if wrong:
            raise UserError(f"cut-cross-entropy {problem}", field=FIELD, value=value, fix="use the backend torch")
