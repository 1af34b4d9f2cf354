"""The one factor between d(STP loss of a microbatch)/dh at a tap and its share of a step's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.seam import GradScale

HOOK = "experimental_attention_variant_loss_scale_func"


def row_factor(config: StpConfig, *, iteration: int, tokens: Tensor | None) -> Tensor | float:
    """What the seam multiplies dL/dh with, beside the value that the schedule hands to `HOOK`.

    Wanted is the gradient of ``lm_loss + weight * STP``, times the optimizer's loss scale S. Per microbatch i of data
    rank d, let L be the mean over the taps of *all* stages, thus ``sum over taps / number of taps``: a stage that
    divided by its own taps would weigh layers by their stage. With M microbatches, D data ranks, C context ranks:

    =============  ===============================  ==================================
    ..             mean over microbatches           mean over tokens (per-token loss)
    =============  ===============================  ==================================
    wanted         sum_id L / (M D)                 sum_id n_id L / sum_id n_id
    hook value     S C / M                          S
    gradients are  summed over i, averaged over     summed over i and all D C ranks,
                   all D C ranks (DDP)              divided by the step's tokens N
    this factor    weight / taps                    weight / taps * n_id
    product        weight / taps * S / (M D)        weight / taps * S * n_id / N
    =============  ===============================  ==================================

    where N is the sum over i, d and c of the token counts that the loss function returns, and n_id that of one
    microbatch over its context ranks: by the same counts, STP weighs a microbatch as the language-model loss does.
    Sources, megatron-core 0.19: hook value, pipeline_parallel/schedules.py `forward_step_calc_loss`; average,
    distributed/distributed_data_parallel.py `gradient_scaling_factor`, for experts by the same number whatever the
    expert-parallel size; N, distributed/finalize_model_grads.py. S goes when the optimizer unscales.

    * Context parallelism: each rank adds dL/dh of the *whole* sequence's L at the positions that it holds. The sum of
      the parameter gradients over C ranks is then the whole one, and the C in the hook's value cancels DDP's.
    * Sequence parallelism: the same for tensor ranks, whose gradients are summed and never averaged, so nothing is
      divided. Without it each tensor rank holds the same states and adds the same rows, as its replicated gradient
      must have them.
    * Pipeline and virtual stages partition the taps, which are counted globally. Nothing else changes.
    * Ramp-up of the global batch: M and N are those of the step that runs, both come from the schedule.
    * Neither MoE nor MTP has a part in it.
    * The weight is that of the iteration, `StpConfig.weight_at`.

    Args:
        config: With the taps of all stages.
        iteration: Iterations completed before this one.
        tokens: n_id, a 0-dim fp32 tensor; None without per-token loss.
    """
    factor = config.weight_at(iteration) / len(config.taps)
    return factor if tokens is None else factor * tokens


def install_scale_hook(transformer_config: Any, scale: GradScale) -> None:
    """Let megatron-core's schedules feed `scale`, beside whatever they fed before.

    Args:
        transformer_config: Megatron's TransformerConfig, before the model is built.
        scale: Set on each stage and microbatch from then on.

    Raises:
        UserError: A megatron-core without the hook.
    """
    if HOOK not in {field.name for field in fields(transformer_config)}:
        raise UserError(
            "this megatron-core has no hook for auxiliary loss scales",
            field="stp",
            fix="install megatron-core 0.19.2",
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
