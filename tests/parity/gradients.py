"""The two sides of the parity tests: plain autograd in one process, and Megatron's schedules on gloo ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.reference import reference_stp_loss
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from tests.parity.cells import ITERATION, Cell
from tests.parity.model import (
    BATCH,
    SEQUENCE,
    Shard,
    build_chunks,
    microbatches,
    named_parameters,
    run_model,
    shard_of,
    transformer_config,
)

Batch = dict[str, Tensor]
_LEARNING_RATE = 1e-2
# Adam divides a gradient by its own size: with the usual 1e-8 it would blow up the rounding of the smallest ones.
_ADAM_EPS = 1e-3


class Outcome(NamedTuple):
    """What one rank, or one process, found.

    Attributes:
        gradients: Of the first step, by parameter.
        parameters: After all steps.
        shards: Which part of a parameter these are, where it is not all of it.
        losses: STP loss by tap in the first step, over all ranks.
        replica: Ranks that hold parts of the same copy of the model have the same.
    """

    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    shards: dict[str, Shard | None]
    losses: dict[int, float]
    replica: tuple[int, int]


# --- plain autograd ---------------------------------------------------------------------------------


def plain_outcome(cell: Cell, *, with_stp: bool = True) -> Outcome:
    """Gradients of ``lm_loss + weight * stp_loss`` by autograd, no schedule and no seam, then torch's own AdamW.

    The losses are means over the microbatches of all data ranks, or over their tokens; the STP loss is the plain
    reference on hidden states that stay in the graph. Losses of the experts and of multi-token prediction are on
    upstream's own autograd functions, with the scale that makes them such means too.
    """
    (chunk,) = build_chunks(_settings(cell), pipeline=1, layers=cell.layers, prediction=cell.prediction)
    chunk.train()
    states = _keep_states(chunk, cell.taps)
    named = dict(named_parameters(chunk))
    optimizer = torch.optim.AdamW(named.values(), lr=_LEARNING_RATE, eps=_ADAM_EPS, weight_decay=0.0)
    first: dict[str, Tensor] = {}
    losses: dict[int, float] = {}
    for step in range(len(cell.microbatches)):
        optimizer.zero_grad()
        by_tap = _plain_backward(chunk, cell, step, states, with_stp=with_stp)
        if step == 0:
            losses = by_tap
            first = {name: parameter.grad.clone() for name, parameter in named.items()}
        optimizer.step()
    after = {name: parameter.detach().clone() for name, parameter in named.items()}
    return Outcome(first, after, dict.fromkeys(named), losses, (0, 0))


def plain_outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Those of several cells, in one process."""
    return [plain_outcome(cell) for cell in cells]


def _plain_backward(
    chunk: Any, cell: Cell, step: int, states: dict[int, Tensor], *, with_stp: bool
) -> dict[int, float]:
    """One step's gradients onto the parameters; the STP loss by tap."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    batches = [
        (rank, number, batch)
        for rank in range(cell.data)
        for number, batch in enumerate(_share_of(cell, step, data_rank=rank))
    ]
    tokens = sum(batch["loss_mask"].sum() for _, _, batch in batches)
    for upstream in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        upstream.set_loss_scale(torch.full((1,), 1.0 / len(batches)))
    by_tap = dict.fromkeys(cell.taps, 0.0)
    for rank, number, batch in batches:
        mask = batch["loss_mask"]
        share = mask.sum() / tokens if cell.per_token else 1.0 / len(batches)
        total = (run_model(chunk, batch) * mask).sum() / mask.sum() * share
        if with_stp:
            terms = _reference_stp(states, cell.stp, iteration=ITERATION + step, microbatch=number, data_rank=rank)
            total = total + cell.stp.weight * torch.stack(list(terms.values())).mean() * share
            for layer, term in terms.items():
                by_tap[layer] += float(term * share)
        total.backward()
    return by_tap


def _share_of(cell: Cell, step: int, *, data_rank: int) -> list[Batch]:
    count = cell.microbatches[step]
    batches = microbatches(count * cell.data, seed=7 + step, masked=cell.masked)
    return batches[data_rank * count : (data_rank + 1) * count]


def _keep_states(chunk: Any, taps: tuple[int, ...]) -> dict[int, Tensor]:
    states: dict[int, Tensor] = {}

    def keep(layer: Any, args: Any, output: Any) -> None:
        states[layer.layer_number] = output[0] if isinstance(output, tuple) else output

    for layer in chunk.decoder.layers:
        if layer.layer_number in taps:
            layer.register_forward_hook(keep)
    return states


def _reference_stp(
    states: dict[int, Tensor], config: StpConfig, *, iteration: int, microbatch: int, data_rank: int
) -> dict[int, Tensor]:
    losses = {}
    for layer in config.taps:
        hidden = states[layer]
        key = DrawKey(seed=config.seed, iteration=iteration, microbatch=microbatch, data_rank=data_rank, layer=layer)
        drawn = draw_triples(
            key, length=hidden.shape[0], batch=hidden.shape[1], n_spans=config.n_spans, device=hidden.device
        )
        triples = [(b, *drawn[:, k, b].tolist()) for k in range(config.n_spans) for b in range(hidden.shape[1])]
        losses[layer] = reference_stp_loss(hidden, triples, tolerance=torch.finfo(hidden.dtype).eps)
    return losses


# --- Megatron's schedules ---------------------------------------------------------------------------


class Rank:
    """One rank's model under Megatron's DDP, with STP, and its data.

    Args:
        cell: What to run.
        stp: None for a model without STP.
    """

    def __init__(self, cell: Cell, stp: StpConfig | None) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from megacpp_stp.stp.install import install_stp

        self.cell = cell
        self.settings = _settings(cell)
        self.chunks = build_chunks(
            self.settings, pipeline=cell.pipeline, virtual=cell.virtual, layers=cell.layers, prediction=cell.prediction
        )
        self.step = 0
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.taps = None
        if stp:
            self.taps = install_stp(self.chunks, stp, iteration=lambda: ITERATION + self.step, data_rank=self.data_rank)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=not cell.double, use_distributed_optimizer=cell.distributed_optimizer
        )
        self.model = [DistributedDataParallel(self.settings, ddp, chunk) for chunk in self.chunks]

    def forward_backward(self, *, force_all_reduce: bool = False) -> None:
        """One step's gradients onto `main_grad`, as the optimizer gets them but unscaled."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        mine = _share_of(self.cell, self.step, data_rank=self.data_rank)
        virtual = self.cell.virtual
        with mock.patch.object(torch.autograd, "backward", _backward):
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=[iter(mine) for _ in self.model] if virtual else iter(mine),
                model=self.model if virtual else self.model[0],
                num_microbatches=len(mine),
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                force_all_reduce=force_all_reduce,
            )
        for chunk in self.model:
            chunk.scale_gradients(1.0 / self.cell.loss_scale)

    def _forward_step(self, iterator: Iterator[Batch], model: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        batch = get_batch_on_this_cp_rank(
            {**next(iterator), "cu_seqlens": None},
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        mask = batch["loss_mask"]
        if self.taps:
            self.taps.set_tokens(mask.sum())

        def loss(per_token: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return (per_token * mask).sum(), mask.sum().to(torch.int), {}

        return run_model(model, batch), loss

    def named(self) -> dict[str, Any]:
        """This rank's parameters."""
        return {name: parameter for chunk in self.chunks for name, parameter in named_parameters(chunk)}


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """What torch.autograd.backward does, with torch's function modes on, and so the CPU backend, in the layers' own.

    A checkpoint of Megatron calls it inside of backward.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _settings(cell: Cell) -> Any:
    from megatron.core.distributed import finalize_model_grads

    logging.getLogger("megatron").setLevel(logging.WARNING)
    experts = any("E" in segment for segment in cell.layers)
    settings = transformer_config(
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
            **cell.settings,
            **cell.model,
        },
    )
    settings.grad_scale_func = lambda loss: loss * cell.loss_scale
    return settings


def schedule_outcome(cell: Cell) -> Outcome:
    """This rank's gradients and parameters by Megatron's own schedule, DDP, finalize and optimizer, with the seam."""
    from megatron.core import parallel_state

    rank = Rank(cell, cell.stp)
    # Of a distributed optimizer's gradients each rank keeps its shard alone, unless told otherwise.
    rank.forward_backward(force_all_reduce=cell.distributed_optimizer)
    gradients = {name: parameter.main_grad.clone() for name, parameter in rank.named().items()}
    groups = [
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
    reading = rank.taps.meter.reduce(device=torch.device("cpu"), groups=groups)
    runs = dict.fromkeys(cell.taps, cell.data * cell.context * cell.microbatches[0])
    assert reading.readings_by_tap == runs, reading
    return Outcome(
        gradients=gradients,
        parameters={} if cell.double else train(rank),
        shards={name: shard_of(name, parameter) for name, parameter in rank.named().items()},
        losses=reading.loss_by_tap,
        replica=(rank.data_rank, parallel_state.get_context_parallel_rank()),
    )


def train(rank: Rank) -> dict[str, Tensor]:
    """This rank's parameters after all steps with Megatron's optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=_LEARNING_RATE,
        adam_eps=_ADAM_EPS,
        weight_decay=0.0,
        clip_grad=0.0,  # the norm's sum has another order on each number of stages, and would spoil equality of bits
        use_distributed_optimizer=rank.cell.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, rank.model)
    for step in range(len(rank.cell.microbatches)):
        rank.step = step
        optimizer.zero_grad()
        rank.forward_backward()
        succeeded, _, _ = optimizer.step()
        assert succeeded
    return {name: parameter.detach().clone() for name, parameter in rank.named().items()}


def gradients_with(cell: Cell, configs: Sequence[StpConfig | None]) -> list[dict[str, Tensor]]:
    """This rank's gradients of the first step, with each of `configs` in place of the cell's own STP."""
    found = []
    for config in configs:
        rank = Rank(cell, config)
        rank.forward_backward()
        found.append({name: parameter.main_grad.clone() for name, parameter in rank.named().items()})
    return found


def trained(cell: Cell, configs: Sequence[StpConfig | None]) -> list[dict[str, Tensor]]:
    """This rank's parameters after all steps, with each of `configs` in place of the cell's own STP."""
    return [train(Rank(cell, config)) for config in configs]


def streams_after(cell: Cell, configs: list[StpConfig | None]) -> list[dict[str, Tensor]]:
    """This rank's random streams at the start, then after a run of the schedule from there with each of `configs`."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    def streams() -> dict[str, Tensor]:
        tracked = get_cuda_rng_tracker().get_states()
        return {name: state.clone() for name, state in ({"default": torch.get_rng_state()} | tracked).items()}

    found = [start := streams()]
    for config in configs:
        torch.set_rng_state(start["default"])
        get_cuda_rng_tracker().set_states({name: start[name].clone() for name in start if name != "default"})
        Rank(cell, config).forward_backward()
        found.append(streams())
    return found
