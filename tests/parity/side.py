"""What both sides of the parity tests share: the model's configuration, the data, and what is compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tests.parity.cell import Cell
from tests.parity.cuts import Cut
from tests.parity.model import microbatches, transformer_config

Batch = dict[str, Tensor]
LEARNING_RATE = 1e-2
# Adam divides a gradient by its own size: with the usual 1e-8 it would blow up the rounding of the smallest ones.
ADAM_EPS = 1e-3

_RECURRENT = {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2}
_SPARSE = {
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 24,  # all of them, for the reason that all experts are chosen
    "dsa_indexer_loss_coeff": 2.0,  # heavy, as the experts' losses
    "dsa_indexer_rotate_activation": False,
}


class Outcome(NamedTuple):
    """What one rank, or one process, found.

    Attributes:
        gradients: Of the first step, by parameter.
        parameters: After all steps.
        cuts: Which part of a parameter these are, where it is not all of it.
        losses: STP loss by tap in the first step, over all ranks.
        replica: Ranks that hold parts of the same copy of the model have the same.
    """

    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    cuts: dict[str, Cut | None]
    losses: dict[int, float]
    replica: tuple[int, int]


@contextmanager
def in_double(cell: Cell) -> Iterator[None]:
    """In a cell in fp64, let upstream's casts to fp32 keep fp64: cross entropy, experts, the indexer and its loss."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double) if cell.double else nullcontext():
        yield


def share_of(cell: Cell, step: int, *, data_rank: int) -> list[Batch]:
    """One data rank's microbatches of a step."""
    count = cell.microbatches[step]
    batches = microbatches(count * cell.data, seed=7 + step, masked=cell.masked)
    return batches[data_rank * count : (data_rank + 1) * count]


def settings_of(cell: Cell) -> Any:
    """The transformer configuration of this rank."""
    from megatron.core.distributed import finalize_model_grads

    logging.getLogger("megatron").setLevel(logging.WARNING)
    experts = any("E" in segment for segment in cell.layers)
    return transformer_config(
        pipeline=cell.pipeline,
        virtual=cell.virtual,
        **{
            "tensor_model_parallel_size": cell.tensor,
            "sequence_parallel": cell.sequence_parallel,
            "context_parallel_size": cell.context,
            "expert_model_parallel_size": cell.expert,
            "num_moe_experts": 4 if experts else None,
            "moe_ffn_hidden_size": 24 if experts else None,
            "moe_shared_expert_intermediate_size": 16 if experts else None,
            "mtp_num_layers": 1 if cell.prediction else None,
            "calculate_per_token_loss": cell.per_token,
            "finalize_model_grads_func": finalize_model_grads,
            "params_dtype": torch.float64 if cell.double else torch.float32,
            "pipeline_dtype": torch.float64 if cell.double else torch.float32,
            "moe_router_dtype": "fp64" if cell.double else "fp32",
            **(_RECURRENT if any("M" in segment for segment in cell.layers) else {}),
            **(_SPARSE if any("D" in segment for segment in cell.layers) else {}),
            **cell.settings,
            **cell.model,
        },
    )
