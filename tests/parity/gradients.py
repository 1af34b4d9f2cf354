"""The two sides of the parity tests: plain autograd in one process, and Megatron's schedules on gloo ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.reference import reference_stp_loss
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from tests.parity.model import (
    build_chunks,
    microbatches,
    named_parameters,
    run_model,
    transformer_config,
)

ITERATION = 3


def plain_gradients(
    config: StpConfig | None, count: int, data_parallel: int, overrides: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Every parameter's gradient of ``lm_loss + weight * stp_loss`` by autograd, no schedule and no seam.

    The losses are means over `count` microbatches and `data_parallel` ranks; the STP loss is the plain reference on
    hidden states that stay in the graph. Losses of the experts, which `overrides` of the configuration may turn on,
    are on upstream's own autograd function with the scale that makes them such means too.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    (chunk,) = build_chunks(transformer_config(pipeline=1, **(overrides or {})), pipeline=1)
    chunk.train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1.0 / (count * data_parallel)))
    total = torch.zeros(())
    for data_rank, tokens in _shared_out(count, data_parallel):
        states = _keep_states(chunk, config.taps if config else ())
        for number, microbatch in enumerate(tokens):
            losses = run_model(chunk, microbatch)
            total = total + losses.mean() / (count * data_parallel)
            if config:
                stp = _reference_stp(states, config, microbatch=number, data_rank=data_rank)
                total = total + config.weight * stp / (count * data_parallel)
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in named_parameters(chunk)}


def _shared_out(count: int, data_parallel: int) -> list[tuple[int, list[Tensor]]]:
    batches = microbatches(count * data_parallel)
    return [(rank, batches[rank * count : (rank + 1) * count]) for rank in range(data_parallel)]


def _keep_states(chunk: Any, taps: tuple[int, ...]) -> dict[int, Tensor]:
    states: dict[int, Tensor] = {}

    def keep(layer: Any, args: Any, output: Any) -> None:
        states[layer.layer_number] = output[0] if isinstance(output, tuple) else output

    for layer in chunk.decoder.layers:
        if layer.layer_number in taps:
            layer.register_forward_hook(keep)
    return states


def _reference_stp(states: dict[int, Tensor], config: StpConfig, *, microbatch: int, data_rank: int) -> Tensor:
    losses = []
    for layer in config.taps:
        hidden = states[layer]
        key = DrawKey(seed=config.seed, iteration=ITERATION, microbatch=microbatch, data_rank=data_rank, layer=layer)
        drawn = draw_triples(
            key, length=hidden.shape[0], batch=hidden.shape[1], n_spans=config.n_spans, device=hidden.device
        )
        triples = [(b, *drawn[:, k, b].tolist()) for k in range(config.n_spans) for b in range(hidden.shape[1])]
        losses.append(reference_stp_loss(hidden, triples, tolerance=torch.finfo(hidden.dtype).eps))
    return torch.stack(losses).mean()


def schedule_gradients(
    config: StpConfig | None,
    count: int,
    pipeline: int,
    virtual: int | None,
    overrides: dict[str, Any] | None = None,
    loss_scale: float | None = None,
) -> dict[str, Tensor]:
    """This rank's gradients from Megatron's own forward-backward schedule, DDP and finalize, with the STP seam.

    Args:
        config: STP, or None for a model without it.
        count: Microbatches a data-parallel rank.
        pipeline: Pipeline-parallel size.
        virtual: Virtual stages a rank.
        overrides: Of the transformer configuration.
        loss_scale: The optimizer's; the gradients come back as it leaves them, unscaled.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megacpp_stp.stp.install import install_stp

    settings = transformer_config(
        pipeline=pipeline, virtual=virtual, finalize_model_grads_func=finalize_model_grads, **(overrides or {})
    )
    if loss_scale is not None:
        settings.grad_scale_func = lambda loss: loss * loss_scale
    chunks = build_chunks(settings, pipeline=pipeline, virtual=virtual)
    data_rank = parallel_state.get_data_parallel_rank()
    if config:
        install_stp(chunks, config, iteration=lambda: ITERATION, data_rank=data_rank)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(settings, ddp, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    _, mine = _shared_out(count, parallel_state.get_data_parallel_world_size())[data_rank]
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(mine) for _ in wrapped] if virtual else iter(mine),
        model=wrapped if virtual else wrapped[0],
        num_microbatches=count,
        seq_length=mine[0].shape[1] - 1,
        micro_batch_size=mine[0].shape[0],
    )
    return {
        name: parameter.main_grad / (loss_scale or 1.0)
        for chunk in chunks
        for name, parameter in named_parameters(chunk)
    }


def streams_after(configs: list[StpConfig | None], count: int, pipeline: int) -> list[dict[str, Tensor]]:
    """This rank's random streams at the start, then after a run of the schedule from there with each of `configs`.

    Attention dropout is on, so that the runs draw from Megatron's tracked streams themselves.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    def streams() -> dict[str, Tensor]:
        tracked = get_cuda_rng_tracker().get_states()
        return {name: state.clone() for name, state in ({"default": torch.get_rng_state()} | tracked).items()}

    found = [start := streams()]
    for config in configs:
        torch.set_rng_state(start["default"])
        get_cuda_rng_tracker().set_states({name: start[name].clone() for name in start if name != "default"})
        schedule_gradients(config, count, pipeline, None, {"attention_dropout": 0.1})
        found.append(streams())
    return found


def _forward_step(iterator: Any, model: Any) -> Any:
    output = run_model(model, next(iterator))

    def loss(per_token: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return per_token.sum(), torch.tensor(per_token.numel(), dtype=torch.int), {}

    return output, loss


def trained_parameters(config: StpConfig | None, count: int, pipeline: int, steps: int) -> dict[str, Tensor]:
    """This rank's parameters after `steps` iterations of Megatron's schedule, DDP and Adam."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megacpp_stp.stp.install import install_stp

    settings = transformer_config(pipeline=pipeline, finalize_model_grads_func=finalize_model_grads)
    chunks = build_chunks(settings, pipeline=pipeline)
    done = 0
    if config:
        data_rank = parallel_state.get_data_parallel_rank()
        install_stp(chunks, config, iteration=lambda: done, data_rank=data_rank)
    model = DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunks[0])
    model.train()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [model])
    settings.grad_scale_func = optimizer.scale_loss
    batches = microbatches(count * steps)
    for done in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        mine = batches[done * count : (done + 1) * count]
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(mine),
            model=model,
            num_microbatches=count,
            seq_length=mine[0].shape[1] - 1,
            micro_batch_size=mine[0].shape[0],
        )
        succeeded, _, _ = optimizer.step()
        assert succeeded
    return {name: parameter.detach().clone() for name, parameter in named_parameters(chunks[0])}
