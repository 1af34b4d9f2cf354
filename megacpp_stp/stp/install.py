"""STP onto Megatron model chunks: the schedules feed its scale, the tapped layers feed its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.diagnosis import Diagnosis
from megacpp_stp.stp.layout import sequence_layout
from megacpp_stp.stp.microbatch import Announcement
from megacpp_stp.stp.scale import install_scale_hook
from megacpp_stp.stp.taps import StpTaps


def install_stp(
    chunks: Sequence[nn.Module], config: StpConfig, *, iteration: Callable[[], int], data_rank: int
) -> StpTaps:
    """Install STP on one rank's model chunks, before they are wrapped in Float16Module and DDP.

    Only layers of the decoder are tapped: those of multi-token prediction start their numbers anew.

    Args:
        chunks: HybridModel instances, one a virtual stage; they share one TransformerConfig.
        config: The run's STP policy.
        iteration: Called in forward; returns the number of iterations completed.
        data_rank: This rank's place in its data-parallel group, the same for all tensor and context ranks.

    Raises:
        UserError: A megatron-core or a mode in which the gradient would not be exact.
    """
    transformer_config: Any = chunks[0].config
    taps = make_taps(config, transformer_config, chunks[0].pg_collection, iteration=iteration, data_rank=data_rank)
    for chunk in chunks:
        stack: Any = chunk.decoder
        taps.attach(stack)
    return taps


def make_taps(
    config: StpConfig, transformer_config: Any, groups: Any, *, iteration: Callable[[], int], data_rank: int
) -> StpTaps:
    """Taps that the schedules feed with their scale, to attach to each stack of this rank. Arguments as above.

    Args:
        config: The run's STP policy.
        transformer_config: Of all the rank's stacks.
        groups: Megatron's ProcessGroupCollection.
        iteration: As in `install_stp`.
        data_rank: As in `install_stp`.

    Raises:
        UserError: As `install_stp`.
    """
    _refuse_sharded_weights(transformer_config)
    layout = sequence_layout(transformer_config, groups)
    taps = StpTaps(
        config,
        iteration=iteration,
        data_rank=data_rank,
        layout=layout,
        announcement=Announcement(
            tokens=transformer_config.calculate_per_token_loss,
            documents=config.within_documents,
            context_group=groups.cp if layout.context_size > 1 else None,
        ),
        diagnosis=Diagnosis(
            config,
            hidden_size=transformer_config.hidden_size,
            copies=layout.context_size,
            shard_group=groups.tp if layout.tensor_size > 1 else None,
        ),
    )
    install_scale_hook(transformer_config, taps.scale)
    return taps


def _refuse_sharded_weights(transformer_config: Any) -> None:
    if transformer_config.gtp_weight_remat_size > 1:
        raise UserError(
            "STP with weights sharded beyond tensor parallelism is not proven",
            field="--gtp-weight-remat-size",
            value=transformer_config.gtp_weight_remat_size,
            fix="leave it out",
        )
