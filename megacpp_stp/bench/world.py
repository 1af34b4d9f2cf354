"""Megatron's process groups of one process alone, for measurements."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


@contextmanager
def one_process_world(device: str) -> Iterator[None]:
    """A world of this process, with the random number trackers seeded.

    Args:
        device: ``cpu``, where the CPU backend is installed too, or ``cuda``.
    """
    import torch

    from megacpp_stp.training.cpu_backend import install

    with install() if device == "cpu" else nullcontext(), tempfile.TemporaryDirectory() as directory:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if device == "cuda":
            torch.cuda.set_device(0)
        backend = "gloo" if device == "cpu" else "nccl"
        rendezvous = (Path(directory) / "rendezvous").as_uri()
        torch.distributed.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
