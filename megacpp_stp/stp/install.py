"""STP onto Megatron model chunks: the schedules feed its scale, the tapped layers feed its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.scale import install_scale_hook
from megacpp_stp.stp.taps import StpTaps


def install_stp(
    chunks: Sequence[nn.Module], config: StpConfig, *, iteration: Callable[[], int], data_rank: int
) -> StpTaps:
    """Install STP on one rank's model chunks, before they are wrapped in Float16Module and DDP.

    Args:
        chunks: HybridModel instances, one a virtual stage; they share one TransformerConfig.
        config: The run's STP policy.
        iteration: Called in forward; returns the number of iterations completed.
        data_rank: This rank's place in its data-parallel group.

    Raises:
        UserError: A megatron-core or a mode in which the gradient would not be exact.
    """
    taps = StpTaps(config, iteration=iteration, data_rank=data_rank)
    transformer_config: Any = chunks[0].config
    install_scale_hook(transformer_config, taps.scale)
    for chunk in chunks:
        stack: Any = chunk.decoder
        taps.attach(stack)
    return taps
