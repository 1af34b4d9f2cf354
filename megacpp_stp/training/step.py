"""The forward step and the language-model loss that Megatron's schedules call.

Letters: b batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.training.data import next_batch
from megacpp_stp.training.recorder import Recorder

LossReport = tuple[Tensor, Tensor, dict[str, Tensor]]


class ForwardStep:
    """Megatron's ``forward_step_func``: one microbatch through one stage.

    Args:
        device: Where this rank computes.
        recorder: Told when an iteration starts, and what each microbatch's loss is.
        check_nan: Stop at a loss that is not finite.
    """

    def __init__(self, *, device: torch.device, recorder: Recorder, check_nan: bool) -> None:
        self._device = device
        self._recorder = recorder
        self._check_nan = check_nan

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], LossReport]]:
        """Run `model` on the next microbatch; the schedule applies the returned loss function on the last stage."""
        if model.training:
            self._recorder.begin_forward()
        batch = next_batch(data_iterator, self._device)
        # Position ids and a None mask as upstream's own entry passes them: attention is causal in the mixers.
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
        return output, partial(self._loss, batch.loss_mask, model.training)

    def _loss(self, loss_mask: Tensor, training: bool, per_token: Tensor) -> LossReport:
        """Summed cross entropy and its token count; Megatron divides one by the other.

        Args:
            loss_mask: ``[b, s]``.
            training: False in evaluation, which the recorder does not see.
            per_token: ``[b, s]`` cross entropy in nats.
        """
        mask = loss_mask.reshape(-1).float()
        total = (per_token.reshape(-1).float() * mask).sum()
        tokens = mask.sum().to(torch.int)
        if self._check_nan:
            _stop_unless_finite(total)
        report = {"lm loss": torch.stack((total.detach(), tokens.float()))}
        if training:
            self._recorder.add_loss(report)
        return total, tokens, report


def _stop_unless_finite(total: Tensor) -> None:
    """Hand the loss to Megatron's rerun machine, which repeats the step to tell a bad GPU from a bad loss."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        machine.validate_result(
            result=total,
            rejection_func=rejected,
            message=f"found {name} in the local forward loss",
            tolerance=0.0,
            fatal=True,
        )
