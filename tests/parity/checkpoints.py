"""Checkpoints of the weights that a rank trains, in Megatron's torch_dist format, by Megatron's own functions."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch

_WEIGHTS_ONLY = {"ckpt_format": "torch_dist", "no_save_optim": True, "no_save_rng": True}


def spoil(chunks: list[Any]) -> list[Any]:
    """Let no number of a bare model be right: a hook for before it is wrapped."""
    with torch.no_grad():
        for chunk in chunks:
            for tensor in (*chunk.parameters(), *expert_biases([chunk]).values()):
                tensor.fill_(torch.nan)
    return chunks


def expert_biases(chunks: list[Any]) -> dict[str, Any]:
    """The buffers that balance the experts, by global layer number; of multi-token prediction by depth and layer."""
    found = {}
    for chunk in chunks:
        layers = {f"layer {layer.layer_number}": layer for layer in chunk.decoder.layers}
        if getattr(chunk, "mtp_process", False):
            layers["prediction"] = chunk.mtp
        for name, layer in layers.items():
            routers = (module for module in layer.modules() if getattr(module, "expert_bias", None) is not None)
            found |= {f"{name}, {number}": router.expert_bias for number, router in enumerate(routers)}
    return found


def save_weights(training: Any, directory: str) -> None:
    """Write them, all ranks together."""
    from megatron.training.checkpointing import save_checkpoint

    vars(training.args).update(save=directory, **_WEIGHTS_ONLY)
    # Saving starts a process of its own, which a daemon may not.
    multiprocessing.current_process()._config["daemon"] = False
    try:
        save_checkpoint(1, training.wrapped, training.optimizer, None, 0)
    finally:
        for child in multiprocessing.active_children():  # it would outlive this one
            child.kill()
            child.join()


def load_weights(training: Any, directory: str) -> None:
    """Read them, all ranks together."""
    from megatron.training.checkpointing import load_checkpoint

    vars(training.args).update(load=directory, finetune=True, **_WEIGHTS_ONLY)
    load_checkpoint(training.wrapped, training.optimizer, None)
