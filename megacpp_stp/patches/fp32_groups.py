"""Patch ``fp32-groups``: fp32 parameters of a 16-bit model in optimizer groups of their own, so that they can be saved.

Such a parameter trains as it should in every optimizer of megatron-core 0.19.2, but the state of a group that has
16-bit parameters too cannot be saved: ``_build_model_and_main_param_groups`` of distrib_optimizer.py puts a group's
fp32 parameters first, and the checkpoint looks for each parameter at the place that it had before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megacpp_stp.patches.surface import AppliedPatch, Surface

SURFACE = Surface(
    id="fp32-groups",
    title="give fp32 parameters of a 16-bit model optimizer groups of their own",
    why="a group of both kinds cannot be saved, and the overrides that make groups are fixed inside pretrain()",
    target="megatron.training.training:get_megatron_optimizer_config",
    consumers=("megatron.training.training:setup_model_and_optimizer",),
    upstream=">=0.19.2,<0.20",
)


def apply() -> AppliedPatch:
    """Replace ``get_megatron_optimizer_config``.

    Returns:
        The handle that undoes it; also a context manager.

    Raises:
        UserError: This megatron-core is not the one that the patch was written for.
    """
    SURFACE.check_version()
    return AppliedPatch(SURFACE, _replacement)


def _replacement(original: Callable[[Any], tuple[Any, Any]]) -> Callable[[Any], tuple[Any, Any]]:
    def get_megatron_optimizer_config(args: Any) -> tuple[Any, Any]:
        """Upstream's, with one more override."""
        config, overrides = original(args)
        return config, {**(overrides or {}), **_fp32_override(args)}

    return get_megatron_optimizer_config


def _fp32_override(args: Any) -> dict[Any, Any]:
    """What parts fp32 parameters from the others; nothing in a model that is fp32 altogether.

    It repeats the weight decay that holds anyway: by the keys of its overrides Megatron tells one group from another,
    here and when it loads a checkpoint.
    """
    import torch
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    if not (args.bf16 or args.fp16):
        return {}
    stays = ParamPredicate(name="stays fp32", fn=lambda parameter: parameter.dtype == torch.float32)
    same = ParamGroupOverride(start_wd=args.start_weight_decay, end_wd=args.end_weight_decay)
    return {ParamKey(predicate=stays): same}
