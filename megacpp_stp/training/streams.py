"""Torch's default random stream in a run that goes on.

Megatron loads a checkpoint, with the state that this stream had, and then builds the data loaders, each of which draws
from it. In a run that was never stopped nothing is drawn at that place. On a CPU this is the device's own stream, from
which hidden dropout draws; Megatron's tracked streams (attention dropout) come back as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def keep_loaded_stream(
    provide: Callable[..., Any], forward_step: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Keep the stream as the checkpoint brought it over the building of the data loaders.

    Args:
        provide: Megatron's ``train_valid_test_dataset_provider``, called after the checkpoint is loaded.
        forward_step: Its ``forward_step_func``, called when all loaders are built.

    Returns:
        Both, to be given to ``pretrain`` in their place.
    """
    kept: list[Tensor] = []

    @wraps(provide)
    def providing(*args: Any, **kwargs: Any) -> Any:
        if not kept:  # virtual stages ask one after the other
            kept.append(torch.get_rng_state())
        return provide(*args, **kwargs)

    def stepping(*args: Any) -> Any:
        if kept:
            torch.set_rng_state(kept.pop())
        return forward_step(*args)

    return providing, stepping
