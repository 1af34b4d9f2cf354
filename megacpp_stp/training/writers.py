"""STP's numbers and the run's in TensorBoard and Weights & Biases, beside Megatron's own and by its rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megacpp_stp.stp.record import scalars

_MEGATRON_WRITES = "stp loss"  # it stands in the loss dictionary, for the console
# What Megatron does not write itself, in its spelling.
OF_THE_RUN = {
    "bits_per_byte": "bits-per-byte",
    "step_time_s": "step-time",
    "tokens_per_s": "tokens-per-second",
    "tflops_per_gpu": "tflops-per-gpu",
    "mfu": "mfu",
    "goodput": "goodput",
    "skipped_iterations": "skipped-iterations",
    "nonfinite_iterations": "nonfinite-iterations",
    "peak_memory_bytes": "peak-memory-bytes",
}
# Read from each rank's own clock.
_BY_THE_CLOCK = ("step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "goodput")


def write_scalars(record: dict[str, Any], *, interval: int, with_loss: bool = False) -> None:
    """Write one iteration where Megatron has opened a writer: on the last rank, with ``--tensorboard-dir``.

    Args:
        record: One iteration of metrics.jsonl.
        interval: ``--tensorboard-log-interval``.
        with_loss: Write the STP loss too, since it is not in the loss dictionary.
    """
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    iteration = record["iteration"]
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is None or iteration % interval:
        return
    values = {name: value for name, value in scalars(record).items() if with_loss or name != _MEGATRON_WRITES}
    values |= {tag: float(record[name]) for name, tag in OF_THE_RUN.items() if record.get(name) is not None}
    for name, value in values.items():
        writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(values, iteration)


def share_times(record: dict[str, Any], *, device: torch.device) -> None:
    """Put rank 0's times into the record of every rank: it writes metrics.jsonl, the last rank the board.

    Args:
        record: Of one iteration; it has the same names on every rank, all of which call this.
        device: Of the small collective.
    """
    names = [name for name in _BY_THE_CLOCK if record.get(name) is not None]
    times = torch.tensor([record[name] for name in names], dtype=torch.float64, device=device)
    dist.broadcast(times, src=0)
    record |= dict(zip(names, times.tolist(), strict=True))
