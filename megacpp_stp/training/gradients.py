"""Gradients that are not finite, seen where they are: before the reduction over data ranks lets all ranks have them.

Megatron reduces a rank's gradients in groups of buckets, each by one method, with overlap in the middle of backward
(``param_and_grad_buffer.py``); that method is wrapped on each group of this rank's model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.\d+$")


class GradientCheck:
    """Looks at each group of gradients once a step.

    Args:
        wanted: Whether to look now, where Megatron itself does not.
        found: Takes what was found, in words; may raise.
    """

    def __init__(self, *, wanted: Callable[[], bool], found: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._found = found

    def watch(self, chunk: Any, *, stage: str) -> None:
        """Look at the gradients of a model chunk under Megatron's DDP.

        Where DDP has its own check switched on, that one looks, and only what it finds is looked at again: it knows
        neither parameter nor stage.

        Args:
            chunk: The chunk.
            stage: What it is of the model, in words.
        """
        names = parameter_names(chunk)
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            group.start_grad_sync = self._checked(group, names, stage)

    def _checked(self, group: Any, names: dict[nn.Parameter, str], stage: str) -> Callable[..., Any]:
        start = group.start_grad_sync

        def checked(*args: Any, **kwargs: Any) -> Any:
            if not group.ddp_config.check_for_nan_in_grad:
                if self._wanted() and not _norms(group).isfinite().all():
                    self._found(describe(group, names, stage=stage))
                return start(*args, **kwargs)
            try:
                return start(*args, **kwargs)
            except RuntimeError:
                if not _norms(group).isfinite().all():
                    self._found(describe(group, names, stage=stage))
                raise

        return checked


def _norms(group: Any) -> Tensor:
    """Of all gradients of a group, one number for each tensor that holds them; by the norm, as upstream's check."""
    held = [bucket.grad_data for bucket in group.buckets]
    # Gradients that are kept in another precision reach the bucket inside of the method that is wrapped.
    held += [parameter.main_grad for bucket in group.buckets for parameter in bucket.params_with_extra_main_grads]
    return torch.stack([tensor.norm(p=2).to(torch.float32) for tensor in held])


def describe(group: Any, names: dict[nn.Parameter, str], *, stage: str) -> str:
    """Which parameters have a gradient that is not finite, in the order of the model.

    Args:
        group: Of buckets; its gradients have not been reduced.
        names: From `parameter_names`.
        stage: What its chunk is of the model.
    """
    here = {parameter for bucket in group.buckets for parameter in bucket.params}
    ordered = [parameter for parameter in names if parameter in here]
    bad = [names[parameter] for parameter in ordered if not parameter.main_grad.isfinite().all()]
    if not bad:
        largest = max(ordered, key=lambda parameter: float(parameter.main_grad.abs().max()))
        return f"norm of the gradient is not finite on {stage}: its numbers are, the largest is in {names[largest]}"
    last = f", the last {bad[-1]}" if len(bad) > 1 else ""
    return f"gradient is not finite on {stage}: {len(bad)} of {len(ordered)} parameters, the first {bad[0]}{last}"


def parameter_names(chunk: nn.Module) -> dict[nn.Parameter, str]:
    """Names of a wrapped chunk's parameters, in its order, with Megatron's global number of their layer."""
    numbers = {
        name: module.layer_number
        for name, module in chunk.named_modules()
        if _LAYER.search(name) and hasattr(module, "layer_number")
    }
    found = {}
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        number = next((numbers[p] for n in range(len(parts)) if (p := ".".join(parts[:n])) in numbers), None)
        bare = re.sub(r"^(module\.)+", "", name)
        found[parameter] = bare if number is None else f"{bare} (layer {number})"
    return found
