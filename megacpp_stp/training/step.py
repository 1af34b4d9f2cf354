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
from megacpp_stp.training.finite import Finite
from megacpp_stp.training.progress import Progress
from megacpp_stp.training.recorder import Recorder

LossReport = tuple[Tensor, Tensor, dict[str, Tensor]]


class ForwardStep:
    """Megatron's ``forward_step_func``: one microbatch through one stage.

    Args:
        device: Where this rank computes.
        recorder: Told when an iteration starts, what each microbatch holds, and what its loss is.
        end_of_document: Token that is the last of each document.
        finite: Looks at each loss, and at the gradients of each model chunk.
        progress: Told where the rank is.
    """

    def __init__(
        self, *, device: torch.device, recorder: Recorder, end_of_document: int, finite: Finite, progress: Progress
    ) -> None:
        self._device = device
        self._recorder = recorder
        self._end_of_document = end_of_document
        self._finite = finite
        self._progress = progress

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], LossReport]]:
        """Run `model` on the next microbatch; the schedule applies the returned loss function on the last stage."""
        self._progress.data(training=model.training)
        self._finite.watch(model)
        self._recorder.begin_forward(training=model.training)
        whole = next_batch(data_iterator, self._device)
        batch = own_part(whole)
        self._recorder.announce(
            tokens=batch.loss_mask.sum(),
            documents=partial(documents_of_tokens, whole.tokens, end_of_document=self._end_of_document),
            training=model.training,
        )
        # Position ids and a None mask as upstream's own entry passes them: attention is causal in the mixers.
        self._progress.forward()
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
        self._progress.backward()
        if output.requires_grad:
            output.register_hook(self._backward_is_here)
        return output, partial(self._loss, batch.loss_mask, model.training)

    def _backward_is_here(self, grad: Tensor) -> None:
        self._progress.backward()

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
        self._finite.loss(total, training=training)
        report = {"lm loss": torch.stack((total.detach(), tokens.float()))}
        self._recorder.add_loss(report, training=training)
        return total, tokens, report
