"""Run a function on several gloo ranks, each a process of its own, and collect what they return.

    def work(layout: Layout, scale: float) -> float: ...          # at module level: it is pickled by name

    results = run_ranks(work, 2, 0.5, layout=Layout(pipeline=2), timeout=60)     # [rank 0's, rank 1's]

In each process the CPU backend is installed, a gloo world and Megatron's process groups exist, and the random number
trackers are seeded.  A rank that raises ends the others at once, and `RankFailed` carries its traceback; ranks that
are still running after `timeout` seconds are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message says which, with its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Megatron's parallel sizes; what is left of the world is data parallel.

    Attributes:
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        virtual: Virtual stages a pipeline rank; None for no interleaving.
        context: Context-parallel size.
        expert: Expert-parallel size.
        seed: Of the random number trackers, the same on every rank.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    expert: int = 1
    seed: int = 1234


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, layout: Layout | None = None, timeout: float = 120.0
) -> list[Any]:
    """Call ``fn(*args)`` on every rank.

    Args:
        fn: A function at the top of a module.
        world_size: Number of ranks.
        args: Its arguments; like its result they must pickle. Tensors go through as copies.
        layout: Parallel sizes; all 1 when None.
        timeout: Seconds for all ranks together, start of the processes included.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankFailed: A rank raised or died, or not all had returned in time.
    """
    context = multiprocessing.get_context("spawn")
    # Pickled here and not by multiprocessing, which would hand tensors over as files that die with their process.
    call = pickle.dumps((fn, args, layout or Layout()))
    with tempfile.TemporaryDirectory() as directory:
        # A file as rendezvous: unlike a port, nobody else can take it.
        rendezvous = Path(directory) / "rendezvous"
        pipes, processes = [], []
        try:
            with _environment():
                for rank in range(world_size):
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_rank_main, args=(sender, call, rank, world_size, rendezvous), daemon=True
                    )
                    process.start()
                    sender.close()
                    pipes.append(receiver)
                    processes.append(process)
            return _collect(pipes, timeout=timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], *, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {missing} had not returned after {timeout:g} s and were killed")
        failures = []
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "died without a word"
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
        if failures:
            raise RankFailed("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(sender: Connection, call: bytes, rank: int, world_size: int, rendezvous: Path) -> None:
    try:
        fn, args, layout = pickle.loads(call)
        with _world(rank, world_size, layout, rendezvous):
            value = fn(*args)
        outcome = pickle.dumps((True, value))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(outcome)


@contextmanager
def _world(rank: int, world_size: int, layout: Layout, rendezvous: Path) -> Iterator[None]:
    import torch

    from megacpp_stp.training.cpu_backend import install

    torch.set_num_threads(1)
    with install():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        torch.distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
        )
        torch.manual_seed(layout.seed)
        model_parallel_cuda_manual_seed(layout.seed)
        # As initialize_megatron does: the scale's shape is that of its first value, and the schedules' is [1].
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        yield
        # A rank that leaves early would take a collective of a slower one down with it.
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextmanager
def _environment() -> Iterator[None]:
    """What a rank must find in its environment when Python starts."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
