"""The names that Megatron imports; for options that no test turns on."""

from __future__ import annotations

from typing import Any


def fused_compute_score_for_moe_aux_loss(*args: Any, **kwargs: Any) -> Any:
    """Not in the double."""
    raise NotImplementedError


fused_moe_aux_loss = fused_topk_with_score_function = fused_compute_score_for_moe_aux_loss
