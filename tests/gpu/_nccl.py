"""Run a function in a process of its own that has a GPU, an NCCL world of one, and Megatron's process groups.

def work(kind: str) -> float: ...          # at module level: it is pickled by name

result = on_gpu(work, "E", timeout=300)
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def on_gpu(fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> Any:
    """Call ``fn(*args)`` there.

    Raises:
        AssertionError: It raised, died, or had not returned after `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        process = context.Process(target=_main, args=(sender, pickle.dumps((fn, args)), Path(directory) / "rendezvous"))
        process.start()
        sender.close()
        try:
            assert receiver.poll(timeout), f"had not returned after {timeout:g} s"
            succeeded, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            succeeded, value = False, "died without a word"
        finally:
            process.kill()
            process.join()
    assert succeeded, value
    return value


def _main(sender: Connection, call: bytes, rendezvous: Path) -> None:
    try:
        fn, args = pickle.loads(call)
        _start(rendezvous)
        outcome = pickle.dumps((True, fn(*args)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(outcome)


def _start(rendezvous: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=rendezvous.as_uri(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="cuda"))
