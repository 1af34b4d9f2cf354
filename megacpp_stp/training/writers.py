"""STP's numbers in TensorBoard and Weights & Biases, beside Megatron's own and by its rules."""

from __future__ import annotations

from typing import Any

from megacpp_stp.stp.record import scalars

_MEGATRON_WRITES = "stp loss"  # it stands in the loss dictionary, for the console


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
    for name, value in values.items():
        writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(values, iteration)
