"""Which auxiliary losses of Megatron's own the first iteration really had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

_INDEXER, _MTP = "indexer loss", "mtp loss"


def collected_here() -> list[str]:
    """Names of the auxiliary losses that this rank's layers have added up since Megatron last logged.

    Read where Megatron keeps them for its log, between the optimizer step and the log: ``load_balancing_loss``,
    ``z_loss``... of the routers, ``indexer loss`` of sparse attention, ``mtp loss`` of multi-token prediction. One that
    is 0 throughout counts as not collected.
    """
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found: dict[str, Tensor | None] = {
        name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items() if name.endswith("loss")
    }
    found[_INDEXER] = DSAIndexerLossLoggingHelper.tracker.get("values")
    found[_MTP] = MTPLossLoggingHelper.tracker.get("loss_values")
    return sorted(name for name, values in found.items() if values is not None and bool(values.any()))


def ranks_by_loss(by_rank: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """On which ranks each auxiliary loss was collected."""
    names = sorted({name for found in by_rank for name in found})
    return {name: [rank for rank, found in enumerate(by_rank) if name in found] for name in names}
