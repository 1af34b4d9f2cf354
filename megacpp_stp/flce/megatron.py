"""Fused linear cross entropy in Megatron's language models, hybrid and GPT.

No name of Megatron's is replaced.  A model's output layer becomes a `FusedOutputLayer`, which returns a
`megacpp_stp.flce.deferred.DeferredLogits`, and the model's ``compute_language_model_loss`` turns one into losses: an
attribute of the model itself, which upstream's own distillation sets, too (``training/distillation/logits_saver.py``).
The main head and the heads of multi-token prediction (``process_mtp_loss``) go through these two, in 0.19.2.

`install_flce` belongs in ``pre_wrap_hooks`` of HybridModelConfig or GPTModelConfig: after the model is built, before
Float16Module and DDP.

Letters: s sequence, b batch, h hidden, v this rank's part of the vocabulary with its padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from megacpp_stp.errors import UserError
from megacpp_stp.flce.backends import Loss, find_backend
from megacpp_stp.flce.chunked import Options
from megacpp_stp.flce.deferred import DeferredLogits, Head


class FusedOutputLayer(ColumnParallelLinear):
    """Megatron's output layer, with its own parameters, state and hooks, that leaves the logits to the loss.

    An existing ColumnParallelLinear becomes one: `install_flce` sets its class.
    """

    fused_head: Head

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, None]:
        """Deferred logits; real ones, [s, b, V], where they are to be gathered, as in inference.

        Args:
            input_: Hidden states [s, b, h], or [s/tp, b, h] under sequence parallelism.
            weight: The tied embedding's; None for this layer's own.
            runtime_gather_output: True to gather the logits of all ranks.
        """
        if runtime_gather_output:
            return super().forward(input_, weight, runtime_gather_output)
        if weight is None:
            weight = self.weight
        assert weight is not None and weight.shape == (self.output_size_per_partition, self.input_size)
        head = self.fused_head
        if not torch.is_grad_enabled():  # process_mtp_loss counts in training only
            head = replace(head, options=replace(head.options, with_best=False))
        return DeferredLogits(input_, weight, head), None


class Installed:
    """Fused losses of one rank's models.

    Attributes:
        calls: How many losses were computed without logits.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._models: list[tuple[Any, type[nn.Module]]] = []

    @property
    def heads(self) -> int:
        """Output layers that are fused; 0 on a rank that has none."""
        return len(self._models)

    def undo(self) -> None:
        """Give each model its own output layer and loss back. A second call does nothing."""
        while self._models:
            model, kind = self._models.pop()
            model.output_layer.__class__ = kind
            del model.output_layer.fused_head
            del model.compute_language_model_loss

    def _add(self, model: Any, head: Head) -> None:
        upstream = model.compute_language_model_loss

        def compute_language_model_loss(_: Any, labels: Tensor, logits: Any) -> Tensor:
            """Losses [b, s] of labels [b, s], as LanguageModule's; real logits go there."""
            if not isinstance(logits, DeferredLogits):
                return upstream(labels, logits)
            self.calls += 1
            return logits.loss(labels.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()

        self._models.append((model, type(model.output_layer)))
        model.output_layer.__class__ = FusedOutputLayer
        model.output_layer.fused_head = head
        model.compute_language_model_loss = MethodType(compute_language_model_loss, model)


def install_flce(
    chunks: Sequence[nn.Module], *, backend: str = "torch", columns: int | None = None, ignore_index: int | None = None
) -> Installed:
    """Fuse the loss of each of one rank's model chunks that computes one.

    Args:
        chunks: HybridModel or GPTModel instances, bare, one a virtual stage.
        backend: See `megacpp_stp.flce.backends.find_backend`.
        columns: Of a block; None for `megacpp_stp.flce.tiles.block_columns`.
        ignore_index: A label whose tokens count for nothing; None as Megatron has it.

    Returns:
        The handle that undoes it, with the number of fused losses so far.

    Raises:
        UserError: No such backend, or a model whose loss cannot be fused exactly; then nothing is changed.
    """
    loss = find_backend(backend)
    models: list[Any] = [chunk for chunk in chunks if getattr(chunk, "post_process", False)]
    for model in models:
        for problem, field, fix in _objections(model):
            raise UserError(problem, field=field, fix=fix)
    installed = Installed()
    for model in models:
        installed._add(model, _head(model, loss, columns=columns, ignore_index=ignore_index))
    return installed


def _head(model: Any, loss: Loss, *, columns: int | None, ignore_index: int | None) -> Head:
    layer, config = model.output_layer, model.config
    options = Options(
        group=layer.tp_group if layer.tp_group.size() > 1 else None,
        sequence_parallel=layer.sequence_parallel,
        ignore_index=ignore_index,
        columns=columns,
        with_best=bool(config.mtp_num_layers),
    )

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return ColumnParallelLinear.forward(layer, hidden, weight)[0]

    return Head(loss=loss, options=options, logits=logits)


def _objections(model: Any) -> Iterator[tuple[str, str, str]]:
    """Problem, field and fix of all that stands in the way."""
    layer, config = model.output_layer, model.config
    if type(layer) is not ColumnParallelLinear:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        yield f"is a {kind}, not Megatron's ColumnParallelLinear", "output_layer", "leave the loss to Megatron"
        return
    found = (
        (config.cross_entropy_loss_fusion, "is another fusion", "--cross-entropy-loss-fusion"),
        (layer.gradient_accumulation_fusion, "is not fused with the loss", "--no-gradient-accumulation-fusion"),
        (config.defer_embedding_wgrad_compute, "needs the logits' gradient", "--defer-embedding-wgrad-compute"),
        (layer.gtp_remat_size > 1, "shards the output weight", "--tensor-parallel-num-weight-shards"),
        (layer.gather_output and layer.tp_group.size() > 1, "gathers the logits", "parallel_output"),
        (layer.bias is not None, "is added to the logits", "output_layer.bias"),
        (layer.disable_grad_reduce, "leaves gradients unreduced", "output_layer.disable_grad_reduce"),
    )
    for wrong, problem, field in found:
        if wrong:
            fix = "add it" if field.startswith("--no-") else "leave it out"
            yield f"{problem}: the fused loss does not do that", field, fix
