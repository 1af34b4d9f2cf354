"""One record an iteration, put together from what Megatron's own hooks show.

* ``forward_step_func`` and its loss function are ours: start of the iteration, loss of each microbatch.
* ``config.finalize_model_grads_func`` is kept by megatron.training when it is set: end of backward, on every rank.
  There the sums are reduced, and the STP loss is put into the loss dictionaries, so that Megatron's console line and
  TensorBoard show it.
* ``optimizer.step`` is wrapped on the instance, as megatron.training itself does for CUDA graphs: the end of the
  iteration, with the gradient norm. So is ``optimizer.sharded_state_dict``: the beginning of a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.runs.metrics import Record
from megacpp_stp.stp.config import FINAL_NORM, tap_name
from megacpp_stp.stp.meter import StpReading
from megacpp_stp.stp.record import diagnosis_record, stp_record
from megacpp_stp.stp.taps import StpTaps
from megacpp_stp.training.progress import Progress

PeakMemory = Callable[[], int]
Split = Literal["train", "valid"]


class Recorder:
    """Collects one iteration at a time and hands out its record.

    Args:
        device: Of the small collectives.
        iteration: Returns the number of iterations completed.
        tokens_per_iteration: Over all data-parallel ranks.
        bits_per_byte: From a split and its loss in nats a token to bits a byte of its text.
        peak_memory: This process's peak memory so far, in bytes.
        emit: Takes each record; called on every rank, after the optimizer step.
        emit_validation: Takes the mean loss of each evaluation; called on every rank, when the next iteration or the
            run ends, or before a checkpoint is written.
        before_save: Called on every rank before a checkpoint is written; None where none is.
        progress: Told where the rank is.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        iteration: Callable[[], int],
        tokens_per_iteration: int,
        bits_per_byte: Callable[[Split, float], float],
        peak_memory: PeakMemory,
        emit: Callable[[Record], None],
        emit_validation: Callable[[Record], None],
        before_save: Callable[[], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._device = device
        self._iteration = iteration
        self._tokens = tokens_per_iteration
        self._bits_per_byte = bits_per_byte
        self._peak_memory = peak_memory
        self._emit = emit
        self._emit_validation = emit_validation
        self._before_save = before_save
        self._progress = progress or Progress(iteration)
        self._evaluated: int | None = None
        self._evaluation_sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._taps: StpTaps | None = None
        self._taps_proven = False
        self._started: float | None = None
        self._reports: list[dict[str, Tensor]] = []
        self._record: Record = {}
        self._wrapped_optimizer: Any = None

    def observe_stp(self, taps: StpTaps) -> None:
        """Include STP in the records."""
        self._taps = taps

    def begin_forward(self, *, training: bool) -> None:
        """A forward starts; the first one of a training iteration starts its clock."""
        if not training:
            self._evaluated = self._record["iteration"] if self._record else self._iteration()
        elif self._started is None:
            self._started = time.perf_counter()

    def announce(self, *, tokens: Tensor, documents: Callable[[], Tensor], training: bool) -> None:
        """Say before a forward what STP must know of the microbatch.

        Args:
            tokens: Scalar, how many of its tokens count on this rank.
            documents: Returns the document number of each position of the whole sequence, ``[b, s]``; called where
                it is wanted alone.
            training: False in evaluation, of which STP knows nothing.
        """
        if training and self._taps is not None:
            wanted = self._taps.config.within_documents
            self._taps.set_microbatch(tokens=tokens, documents=documents() if wanted else None)

    def add_loss(self, report: dict[str, Tensor], *, training: bool) -> None:
        """Take one microbatch's loss report, the dictionary that Megatron logs from."""
        if training:
            self._reports.append(report)
        else:
            self._evaluation_sums += report["lm loss"].to(torch.float64)

    def end_evaluation(self) -> None:
        """Hand out the loss of the evaluation since the last iteration, if there was one. All ranks call it."""
        if self._evaluated is None:
            return
        loss, _ = self._mean_over_ranks(self._evaluation_sums)
        self._evaluation_sums.zero_()
        bits = self._bits_per_byte("valid", loss)
        self._emit_validation({"iteration": self._evaluated, "lm_loss": loss, "bits_per_byte": bits})
        self._evaluated = None

    def install(self, transformer_config: Any) -> None:
        """Hook into the end of backward, before megatron.training sets its default there."""
        from megatron.core.distributed import finalize_model_grads

        earlier = transformer_config.finalize_model_grads_func or finalize_model_grads

        def finalize(*args: Any, **kwargs: Any) -> None:
            earlier(*args, **kwargs)
            self._end_backward()
            self._wrap_optimizer(transformer_config)

        transformer_config.finalize_model_grads_func = finalize

    def _end_backward(self) -> None:
        self.end_evaluation()
        iteration = self._iteration()
        loss, tokens = self._mean_over_ranks(self._loss_sums())
        # Like Megatron's console: the first iteration is 1.
        self._record = {
            "iteration": iteration + 1,
            "lm_loss": loss,
            "bits_per_byte": self._bits_per_byte("train", loss),
            "tokens": self._tokens,
            "loss_tokens": int(tokens),
        }
        if self._taps is not None:
            reading = self._taps.meter.reduce(device=self._device, groups=data_then_pipeline())
            if not self._taps_proven:
                require_fed(reading)
                self._taps_proven = True
            self._record.update(stp_record(self._taps.config, reading, iteration))
            if self._taps.diagnosis is not None and self._taps.config.is_diagnosed(iteration):
                found = self._taps.diagnosis.reduce(device=self._device, groups=data_then_pipeline())
                self._record.update(diagnosis_record(found))
            for report in self._reports if reading.loss is not None else ():
                report["stp loss"] = torch.tensor([reading.loss], device=self._device)
        self._reports = []

    def _loss_sums(self) -> Tensor:
        """Summed loss and tokens of this rank's microbatches; zeros before the last stage."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for report in self._reports:
            sums += report["lm loss"].to(torch.float64)
        return sums

    def _mean_over_ranks(self, sums: Tensor) -> tuple[float, float]:
        """Mean loss a token and the number of tokens, over all ranks."""
        for group in data_then_pipeline():
            dist.all_reduce(sums, group=group)
        total, tokens = sums.tolist()
        return total / max(tokens, 1.0), tokens

    def _wrap_optimizer(self, transformer_config: Any) -> None:
        # megatron.training sets grad_scale_func to the optimizer's own bound method.
        optimizer = transformer_config.grad_scale_func.__self__
        if optimizer is self._wrapped_optimizer:
            return
        step = optimizer.step

        def recorded_step(*args: Any, **kwargs: Any) -> Any:
            self._progress.optimizer()
            result = step(*args, **kwargs)
            self._end_iteration(optimizer, result)
            self._progress.stepped()
            return result

        optimizer.step = recorded_step
        self._wrapped_optimizer = optimizer
        if self._before_save is not None:
            self._wrap_saving(optimizer, self._before_save)

    def _wrap_saving(self, optimizer: Any, before_save: Callable[[], None]) -> None:
        """A checkpoint asks each rank's optimizer for its state. What came before it belongs into the records."""
        state = optimizer.sharded_state_dict

        def recorded_state(*args: Any, **kwargs: Any) -> Any:
            self._progress.save()
            self.end_evaluation()
            before_save()
            return state(*args, **kwargs)

        optimizer.sharded_state_dict = recorded_state

    def _end_iteration(self, optimizer: Any, result: tuple[bool, float | None, int | None]) -> None:
        succeeded, grad_norm, _ = result
        peak = torch.tensor([self._peak_memory()], dtype=torch.int64, device=self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        assert self._started is not None
        elapsed = time.perf_counter() - self._started
        self._started = None
        self._record.update(
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=max(group["lr"] for group in optimizer.param_groups),
            loss_scale=float(optimizer.get_loss_scale()),
            skipped=not succeeded,
            step_time_s=elapsed,
            tokens_per_s=self._tokens / elapsed,
            peak_memory_bytes=int(peak.item()),
        )
        self._emit(self._record)


def require_fed(reading: StpReading) -> None:
    """A tap that no rank ever fed is a wiring error, not a silent zero.

    Raises:
        UserError: With the first such tap.
    """
    dead = [tap for tap, count in reading.readings_by_tap.items() if count == 0]
    if dead:
        place = "the final norm" if dead[0] == FINAL_NORM else f"layer {dead[0]}"
        raise UserError(
            f"no rank fed the tap after {place} in the first iteration",
            field="stp.taps",
            value=[tap_name(tap) for tap in reading.readings_by_tap],
            fix="tap layers that the model has; `megacpp-stp plan` shows them",
        )


def data_then_pipeline() -> list[dist.ProcessGroup]:
    """The groups over which a rank's sums are added up: data with context ranks, then pipeline ranks."""
    from megatron.core import parallel_state

    return [
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
