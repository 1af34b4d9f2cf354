"""The one factor between d(STP loss of a microbatch)/dh at a tap and its share of a step's gradient.

Wanted is the gradient of ``lm_loss + weight * mean over microbatches, data ranks and taps of L``, times Megatron's
loss scale S. On its way a gradient that is added at a tap is

* summed over microbatches, so it needs ``1 / num_microbatches``;
* divided by the number of data- and context-parallel ranks by DDP (distributed_data_parallel.py, no per-token loss),
  which is the mean over data ranks and, for a context-parallel size of 1, just that;
* divided by S when the optimizer unscales.

megatron-core 0.19 hands ``S * cp / num_microbatches`` to ``config.experimental_attention_variant_loss_scale_func``
after each forward step of each stage (schedules.py, `forward_step_calc_loss`). What the seam adds is therefore that
factor times ``weight / number of taps on all stages`` times the closed-form gradient. Neither MoE nor MTP changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.seam import GradScale

HOOK = "experimental_attention_variant_loss_scale_func"


def row_factor(config: StpConfig) -> float:
    """What the closed-form gradient is multiplied with before the schedule's scale: weight over all stages' taps."""
    return config.weight / len(config.taps)


def install_scale_hook(transformer_config: Any, scale: GradScale) -> None:
    """Let megatron-core's schedules feed `scale`, beside whatever they fed before.

    Args:
        transformer_config: Megatron's TransformerConfig, before the model is built.
        scale: Set on each stage and microbatch from then on.

    Raises:
        UserError: A megatron-core without the hook, or a loss mode whose scale is not proven yet.
    """
    if HOOK not in {field.name for field in fields(transformer_config)}:
        raise UserError(
            "this megatron-core has no hook for auxiliary loss scales",
            field="stp",
            fix="install megatron-core 0.19.2",
        )
    if transformer_config.calculate_per_token_loss:
        raise UserError(
            "STP under --calculate-per-token-loss is not proven yet",
            field="--calculate-per-token-loss",
            fix="leave it out",
        )
    if transformer_config.context_parallel_size > 1 or transformer_config.sequence_parallel:
        raise UserError(
            "STP over a split sequence is not proven yet",
            field="parallel",
            fix="use context-parallel size 1 and no sequence parallelism",
        )
    earlier = getattr(transformer_config, HOOK) or _upstream_default(transformer_config)

    def feed(value: Tensor) -> None:
        scale.set(value)
        if earlier is not None:
            earlier(value)

    setattr(transformer_config, HOOK, feed)


def _upstream_default(transformer_config: Any) -> Callable[[Tensor], None] | None:
    """What the schedules would call were the slot empty: the sparse-attention indexer's own scaler."""
    if transformer_config.experimental_attention_variant != "dsa":
        return None
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler

    return DSAIndexerLossAutoScaler.set_loss_scale
