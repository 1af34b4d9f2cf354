"""Surface ``fp32-groups``: fp32 parameters of a 16-bit model in optimizer groups of their own, so they can be saved.

Such a parameter trains as it should in every optimizer of megatron-core 0.19.2, but the state of a group that has
16-bit parameters too cannot be saved: ``_build_model_and_main_param_groups`` of distrib_optimizer.py puts a group's
fp32 parameters first, and the checkpoint looks for each parameter at the place that it had before.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megacpp_stp.patches.contract import Hits, Plan, Probe, ProbeFailed, Replacement, Surface

_TARGET = "megatron.training.training:get_megatron_optimizer_config"
_CONSUMER = "megatron.training.training:setup_model_and_optimizer"
_KEEP_FP32 = ("mamba3", "m2rnn")


def _unneeded(plan: Plan) -> str | None:
    if plan["recipe"]["training"]["precision"] == "fp32":
        return "all its parameters are fp32"
    if not any(layer["kind"] in _KEEP_FP32 for layer in plan["layout"]["layers"]):
        return "no layer of it keeps fp32 parameters"
    return None


def _replace(originals: Mapping[str, Any], hits: Hits) -> dict[str, Replacement]:
    original = originals[_TARGET]

    def get_megatron_optimizer_config(args: Any) -> tuple[Any, Any]:
        """Upstream's, with one more override."""
        config, overrides = original(args)
        return config, {**(overrides or {}), **_fp32_override(args)}

    return {_TARGET: Replacement(value=get_megatron_optimizer_config)}


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


def _probe(probe: Probe) -> str:
    """By Megatron's own rules, which overrides a parameter of each kind gets, before and after."""
    import torch
    from megatron.core.optimizer_param_scheduler import combine_param_group_overrides

    def group(config_of: Any, dtype: Any, *, ndim: int, bf16: bool) -> Any:
        args = SimpleNamespace(bf16=bf16, fp16=False, start_weight_decay=0.25, end_weight_decay=0.5)
        parameter = torch.nn.Parameter(torch.zeros((2,) * ndim, dtype=dtype))
        matching = [value for key, value in config_of(args)[1].items() if key.matches(parameter, "probe.weight")]
        return combine_param_group_overrides(matching)

    original, patched = probe.originals[_TARGET], probe.through[_TARGET][_CONSUMER]
    for ndim in (1, 2):
        for dtype, bf16 in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
            before = group(original, dtype, ndim=ndim, bf16=bf16)
            after = group(patched, dtype, ndim=ndim, bf16=bf16)
            parted = dtype is torch.float32 and bf16
            if after != ({**before, "start_wd": 0.25, "end_wd": 0.5} if parted else before):
                raise ProbeFailed(f"a {dtype} parameter of {ndim} dimensions in a {bf16=} run gets {after}")
    return "fp32 parameters of a bf16 run have groups of their own with their weight decay; all others are unchanged"


SURFACE = Surface(id="fp32-groups", unneeded=_unneeded, replace=_replace, probe=_probe)
