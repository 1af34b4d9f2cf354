"""Torch's own Adam under Megatron's distributed optimizer, made loadable from a checkpoint.

Where neither Transformer Engine nor apex is installed, megatron-core 0.19.2 trains with torch's Adam, whose state has a
tensor ``step`` for each parameter. ``distrib_optimizer.py`` saves one number for all of them, and then

* ``state_dict`` wants that number of an optimizer that has not stepped yet, as one that is about to load has not;
* ``load_state_dict`` gives one tensor to all parameters, each of which adds to it in each step;
* ``load_parameter_state_from_fully_reshardable`` looks for the tensor in a checkpoint that has none.
"""

from __future__ import annotations

from typing import Any

import torch


def get_loadable_optimizer(*args: Any, **kwargs: Any) -> Any:
    """Stands in for ``get_megatron_optimizer``: what it returns can load what it saved."""
    from megatron.core.optimizer import get_megatron_optimizer

    return make_loadable(get_megatron_optimizer(*args, **kwargs))


def make_loadable(optimizer: Any) -> Any:
    """Let the distributed optimizers over torch's Adam load what they saved.

    Args:
        optimizer: One of Megatron's, or a chain of them. Others than those are left as they are.

    Returns:
        `optimizer`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam):
            _wrap(part)
    return optimizer


def _wrap(distributed: Any) -> None:
    shard, load = distributed.sharded_state_dict, distributed.load_parameter_state_from_fully_reshardable

    def sharded_state_dict(model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading:
            _begin(distributed.optimizer)
        return shard(model_sharded_state_dict, is_loading, **kwargs)

    def load_parameter_state_from_fully_reshardable(state_dict: Any) -> None:
        states = list(distributed.optimizer.state.values())
        counts = [state.pop("step") for state in states]
        load(state_dict)
        for state, count in zip(states, counts, strict=True):
            state["step"] = count.clone()

    distributed.sharded_state_dict = sharded_state_dict
    distributed.load_parameter_state_from_fully_reshardable = load_parameter_state_from_fully_reshardable


def _begin(adam: torch.optim.Adam) -> None:
    """The state that Adam itself begins with in its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
