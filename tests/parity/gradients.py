"""Megatron's schedules on gloo ranks, with the seam: the side of the parity tests that is tested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megacpp_stp.stp.config import StpConfig
from tests.parity.cell import ITERATION, Cell
from tests.parity.cuts import cut_of
from tests.parity.model import BATCH, SEQUENCE, build_chunks, named_parameters, run_model
from tests.parity.side import ADAM_EPS, LEARNING_RATE, Batch, Outcome, in_double, settings_of, share_of


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
        self.settings = settings_of(cell)
        self.settings.grad_scale_func = lambda loss: loss * cell.loss_scale[self.step]
        self.chunks = build_chunks(
            self.settings, pipeline=cell.pipeline, virtual=cell.virtual, layers=cell.layers, prediction=cell.prediction
        )
        self.step = 0
        self.scaler: Any = None
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.taps = None
        if stp:
            self.taps = install_stp(self.chunks, stp, iteration=lambda: ITERATION + self.step, data_rank=self.data_rank)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=not cell.double, use_distributed_optimizer=cell.distributed_optimizer
        )
        self.model = [DistributedDataParallel(self.settings, ddp, chunk) for chunk in self.chunks]

    def forward_backward(self, *, force_all_reduce: bool = False) -> None:
        """One step's gradients onto `main_grad`, unscaled unless the optimizer does that."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        mine = share_of(self.cell, self.step, data_rank=self.data_rank)
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
        if self.scaler is None:
            for chunk in self.model:
                chunk.scale_gradients(1.0 / self.cell.loss_scale[self.step])

    def scale_with(self, optimizer: Any) -> None:
        """Let Megatron's optimizer scale the loss, and unscale the gradients."""
        self.scaler = optimizer
        self.settings.grad_scale_func = optimizer.scale_loss

    def _forward_step(self, iterator: Iterator[Batch], model: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        batch = {**next(iterator), "cu_seqlens": None}
        documents = batch.pop("documents")  # of the whole sequence, on every rank
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        mask = batch["loss_mask"]
        if self.taps:
            self.taps.set_microbatch(tokens=mask.sum(), documents=documents)
        overflow = float("inf") if self.scaler is not None and self.step == self.cell.skipped else 1.0

        def loss(per_token: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return (per_token * mask).sum() * overflow, mask.sum().to(torch.int), {}

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
        cuts={name: cut_of(name, parameter) for name, parameter in rank.named().items()},
        losses=reading.loss_by_tap,
        replica=(rank.data_rank, parallel_state.get_context_parallel_rank()),
    )


def schedule_outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Those of several cells of one layout, one after the other on the same ranks."""
    found = []
    for cell in cells:
        with in_double(cell):
            found.append(schedule_outcome(cell))
    return found


def train(rank: Rank) -> dict[str, Tensor]:
    """This rank's parameters after all steps with Megatron's optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    cell = rank.cell
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        adam_eps=ADAM_EPS,
        weight_decay=0.0,
        clip_grad=0.0,  # the norm's sum has another order on each number of stages, and would spoil equality of bits
        use_distributed_optimizer=cell.distributed_optimizer,
        # fp16's dynamic scale, on fp32 parameters.
        fp16=cell.skipped is not None,
        initial_loss_scale=cell.loss_scale[0],
        loss_scale_window=1,
        hysteresis=1,
    )
    optimizer = get_megatron_optimizer(config, rank.model)
    if cell.skipped is not None:
        rank.scale_with(optimizer)
    for step in range(len(cell.microbatches)):
        rank.step = step
        if rank.scaler is not None:
            assert float(optimizer.get_loss_scale()) == cell.loss_scale[step], step
        optimizer.zero_grad()
        rank.forward_backward()
        succeeded, _, _ = optimizer.step()
        assert succeeded == (step != cell.skipped), step
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
