"""What follows a loss, an STP loss or a gradient that is not finite: the run ends, or the step is skipped.

To end it, the rank that sees one raises at once, with all that it knows. To skip the step, all ranks go on to the
end of backward, and agree there by one reduction over the world; then none lets its optimizer step. Megatron takes that
for a step that its optimizer refused: the learning rate's schedule stays where it is, and gradients are zeroed next.

fp16 is of its own kind: an overflow of its scaled gradients is what lets the loss scale fall, by Megatron's optimizer.
They are looked at here only once the scale cannot fall any more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacpp_stp.patches.agreement import gather
from megacpp_stp.runs.failures import CAUSES, NONFINITE
from megacpp_stp.stp.config import tap_name
from megacpp_stp.stp.taps import StpTaps
from megacpp_stp.training.gradients import GradientCheck

_NULL = ("lm_loss", "bits_per_byte", "stp_loss", "stp_weighted")  # of a step that was skipped


class NonFinite(FloatingPointError):
    """A number that ends the run.

    Args:
        text: What it is, where.
        cause: One of `CAUSES`.
        agreed: Whether all ranks say the same.
    """

    kind = NONFINITE

    def __init__(self, text: str, *, cause: str, agreed: bool = False) -> None:
        super().__init__(text)
        self.cause = cause
        self.agreed = agreed


class Finite:
    """One rank's eyes on its numbers.

    Args:
        device: Of the collective.
        iteration: Returns the number of iterations completed.
        most_skipped: So many steps in a row may be skipped; None ends the run at the first.
        in_a_row: How many were, just before this start of the run.
        lowest_scale: Where fp16's loss scale stops falling; None for other precisions.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        iteration: Callable[[], int],
        most_skipped: int | None,
        in_a_row: int = 0,
        lowest_scale: float | None = None,
    ) -> None:
        self._device = device
        self._iteration = iteration
        self._most_skipped = most_skipped
        self._in_a_row = in_a_row
        self._lowest_scale = lowest_scale
        self._at_lowest: bool | None = None
        self._taps: StpTaps | None = None
        self._gradients = GradientCheck(wanted=self._looks_at_gradients, found=self._gradient_found)
        self._watched: list[Any] = []
        self._config: Any = None
        self._losses: list[Tensor] = []
        self._seen: str | None = None
        self._skipped_for: str | None = None
        self._wrapped_optimizer: Any = None

    @property
    def _skips(self) -> bool:
        return self._most_skipped is not None

    def observe_stp(self, taps: StpTaps) -> None:
        """Look at STP's losses too."""
        self._taps = taps

    def install(self, transformer_config: Any) -> None:
        """Hook into the end of backward, before the recorder does."""
        from megatron.core.distributed import finalize_model_grads

        self._config = transformer_config
        earlier = transformer_config.finalize_model_grads_func or finalize_model_grads

        def finalize(model: list[Any], *args: Any, **kwargs: Any) -> None:
            # Balancing the experts is a step too, which upstream takes with the reduction of gradients.
            biases = [(bias, bias.clone()) for bias in _expert_biases(model)] if self._skips else []
            earlier(model, *args, **kwargs)
            self._judge()
            for bias, before in biases if self._skipped_for else ():
                bias.copy_(before)
            self._wrap_optimizer()

        transformer_config.finalize_model_grads_func = finalize

    def watch(self, chunk: Any) -> None:
        """Look at the gradients of a model chunk, from before its first backward on; again is for nothing."""
        if any(chunk is known for known in self._watched):
            return
        self._watched.append(chunk)
        self._gradients.watch(chunk, stage=_stage(len(self._watched) - 1))

    def loss(self, total: Tensor, *, training: bool) -> None:
        """Look at the summed loss of a microbatch.

        Raises:
            NonFinite: It ends the run. An evaluation's always does: there is no step to skip.
        """
        if training:
            self._losses.append(total.detach())
            if self._skips:
                return
        if not torch.isfinite(total):
            what = self._loss_text(len(self._losses)) if training else "lm loss of the evaluation after it"
            raise NonFinite(f"{self._place}: {what} is {float(total.detach())}", cause="lm_loss")

    def told(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a metrics record says of a step that was skipped.

        Args:
            record: Of the iteration, as it is.

        Returns:
            Names and values to put into it.
        """
        kind = self._skipped_for
        return {"nonfinite": kind, **({name: None for name in _NULL if name in record} if kind else {})}

    def _looks_at_gradients(self) -> bool:
        if self._lowest_scale is None:
            return True
        if self._at_lowest is None:
            self._at_lowest = self._is_at_lowest()
        return self._at_lowest

    def _is_at_lowest(self) -> bool:
        assert self._lowest_scale is not None
        return float(self._optimizer().get_loss_scale()) <= self._lowest_scale

    def _optimizer(self) -> Any:
        # megatron.training sets grad_scale_func to the optimizer's own bound method.
        return self._config.grad_scale_func.__self__

    def _gradient_found(self, text: str) -> None:
        if not self._skips:
            self._raise_for_stp()  # a loss spoils its gradients
            raise NonFinite(f"{self._place}: {text}", cause="gradient")
        self._seen = self._seen or text

    def _raise_for_stp(self) -> None:
        if (text := self._stp_text()) is not None:
            raise NonFinite(f"{self._place}: {text}", cause="stp_loss")

    def _judge(self) -> None:
        """At the end of backward: end the run, agree to skip the step, or nothing."""
        self._skipped_for = None
        if self._skips:
            self._agree()
        else:
            self._raise_for_stp()
        self._losses, self._seen = [], None

    def _agree(self) -> None:
        """The one decision of all ranks.

        Raises:
            NonFinite: One step too many in a row; on every rank.
        """
        finite = torch.stack(self._losses).isfinite().tolist() if self._losses else []
        loss = f"{self._loss_text(finite.index(False) + 1)} is not finite" if False in finite else None
        mine = dict(zip(CAUSES, (loss, self._stp_text(), self._seen), strict=True))
        bad = torch.tensor([text is not None for text in mine.values()], dtype=torch.int32, device=self._device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        causes = [cause for cause, flag in zip(CAUSES, bad.tolist(), strict=True) if flag]
        if not causes:
            return
        self._skipped_for = cause = causes[0]
        self._in_a_row += 1
        told = [f"rank {rank}: {texts[cause]}" for rank, texts in enumerate(gather(mine)) if texts[cause]]
        what = "; ".join(told)
        assert self._most_skipped is not None
        if self._in_a_row > self._most_skipped:
            before = f"{self._most_skipped} steps in a row were skipped for such numbers before it"
            raise NonFinite(f"{self._place}: {what}; {before}", cause=cause, agreed=True)
        if dist.get_rank() == 0:
            print(f"megacpp-stp: {self._place} is skipped: {what}", file=sys.stderr, flush=True)

    def _wrap_optimizer(self) -> None:
        optimizer = self._optimizer()
        if optimizer is self._wrapped_optimizer:
            return
        step = optimizer.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._skipped_for is not None:
                return False, None, None  # as upstream's own optimizers say it
            result = step(*args, **kwargs)
            succeeded, norm, _ = result
            if norm is not None and not math.isfinite(float(norm)):
                raise NonFinite(f"{self._place}: norm of the reduced gradient is {float(norm)}", cause="gradient")
            if succeeded:
                self._in_a_row = 0
            self._at_lowest = None
            return result

        optimizer.step = guarded
        self._wrapped_optimizer = optimizer

    def _stp_text(self) -> str | None:
        taps = self._taps.meter.nonfinite() if self._taps is not None else ()
        return f"STP loss after {', '.join(map(_tap_text, taps))} is not finite" if taps else None

    def _loss_text(self, microbatch: int) -> str:
        return f"lm loss of microbatch {microbatch}"

    @property
    def _place(self) -> str:
        return f"iteration {self._iteration() + 1}"


def _tap_text(tap: int) -> str:
    name = tap_name(tap)
    return f"layer {name}" if name.isdigit() else name


def _stage(chunk: int) -> str:
    from megatron.core import parallel_state

    stage = f"pipeline stage {parallel_state.get_pipeline_model_parallel_rank()}"
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return stage if virtual is None else f"{stage}, virtual stage {chunk}"


def _expert_biases(model: list[Any]) -> list[Tensor]:
    """What balances the experts without a loss, on this rank."""
    modules = (module for chunk in model for module in chunk.modules())
    return [bias for module in modules if isinstance(bias := getattr(module, "expert_bias", None), Tensor)]
