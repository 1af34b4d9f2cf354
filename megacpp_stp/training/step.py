"""The forward step and the language-model loss that Megatron's schedules call.

Letters: b batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.stp.documents import documents_of_tokens
from megacpp_stp.training.data import next_batch, own_part
from megacpp_stp.training.recorder import Recorder

LossReport = tuple[Tensor, Tensor, dict[str, Tensor]]


class ForwardStep:
    """Megatron's ``forward_step_func``: one microbatch through one stage.

    Args:
        device: Where this rank computes.
        recorder: Told when an iteration starts, what each microbatch holds, and what its loss is.
        end_of_document: Token that is the last of each document.
        check_nan: Stop at a loss that is not finite.
    """

    def __init__(self, *, device: torch.device, recorder: Recorder, end_of_document: int, check_nan: bool) -> None:
        self._device = device
        self._recorder = recorder
        self._end_of_document = end_of_document
        self._check_nan = check_nan

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], LossReport]]:
        """Run `model` on the next microbatch; the schedule applies the returned loss function on the last stage."""
        self._recorder.begin_forward(training=model.training)
        whole = next_batch(data_iterator, self._device)
        batch = own_part(whole)
        self._recorder.announce(
            tokens=batch.loss_mask.sum(),
            documents=partial(documents_of_tokens, whole.tokens, end_of_document=self._end_of_document),
            training=model.training,
        )
        # Position ids and a None mask as upstream's own entry passes them: attention is causal in the mixers.
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
        return output, partial(self._loss, batch.loss_mask, model.training)

    def _loss(self, loss_mask: Tensor, training: bool, per_token: Tensor) -> LossReport:
        """Summed cross entropy and its token count; Megatron divides one by the other.

        Args:
            loss_mask: ``[b, s]``.
            training: False in evaluation.
            per_token: ``[b, s]`` cross entropy in nats.
        """
        mask = loss_mask.reshape(-1).float()
        total = (per_token.reshape(-1).float() * mask).sum()
        tokens = mask.sum().to(torch.int)
        if self._check_nan:
            _stop_unless_finite(total, training=training)
        report = {"lm loss": torch.stack((total.detach(), tokens.float()))}
        self._recorder.add_loss(report, training=training)
        return total, tokens, report


def _stop_unless_finite(total: Tensor, *, training: bool) -> None:
    """End the run at the first loss that is no number.

    Raises:
        FloatingPointError: The loss of a microbatch is NaN or infinite.
    """
    if not torch.isfinite(total):
        where = "training" if training else "evaluation"
        raise FloatingPointError(f"lm loss of a {where} microbatch is {float(total)}")
