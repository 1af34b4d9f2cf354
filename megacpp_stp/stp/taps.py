"""Taps: where hidden states are read, measured and, once the gate is open, given the STP gradient.

Letters: s sequence, b batch, h hidden, K spans a sequence, n = K * b triples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.meter import Meter
from megacpp_stp.stp.objective import stp_terms
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from megacpp_stp.stp.scale import row_factor
from megacpp_stp.stp.seam import GradScale, inject


class StpTaps:
    """STP on one rank: reads the tapped layers of each stack that it is attached to.

    Args:
        config: The run's STP policy, with the taps of all stages.
        iteration: Called in forward; returns the number of iterations completed.
        data_rank: This rank's place in its data-parallel group.
    """

    def __init__(self, config: StpConfig, *, iteration: Callable[[], int], data_rank: int) -> None:
        self.config = config
        self.scale = GradScale()
        self.meter = Meter(config.taps)
        self._iteration = iteration
        self._data_rank = data_rank

    def attach(self, stack: nn.Module) -> tuple[int, ...]:
        """Tap the layers of one Megatron stage (its ``layers`` carry global numbers).

        Args:
            stack: A HybridStack, before it is wrapped in DDP.

        Returns:
            The layer numbers tapped on this stage; none is fine, another stage may have them.

        Raises:
            UserError: A mode in which a layer's forward hook would not run, or would run twice.
        """
        transformer_config: Any = stack.config
        if transformer_config.recompute_granularity == "full":
            raise UserError(
                "taps under full activation recomputation are not proven yet",
                field="--recompute-granularity",
                value="full",
                fix="use selective recomputation or none",
            )
        if transformer_config.cuda_graph_impl != "none":
            raise UserError(
                "a captured layer skips its forward hooks, so taps would not be fed",
                field="--cuda-graph-impl",
                value=transformer_config.cuda_graph_impl,
                fix="leave it out",
            )
        tapped = [layer for layer in stack.layers if layer.layer_number in self.config.taps]
        for layer in tapped:
            layer.register_forward_hook(self._after_layer)
        return tuple(layer.layer_number for layer in tapped)

    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return output
        number: Any = layer.layer_number
        # Written onto each layer by the schedules before its forward (cuda_graphs.py, set_current_microbatch).
        microbatch: Any = getattr(layer, "current_microbatch", None)
        if microbatch is None:
            raise UserError(
                f"the schedule did not say which microbatch layer {number} is running",
                field="stp",
                fix="use megatron-core's own schedules, 0.19 or newer",
            )
        if isinstance(output, tuple):  # TransformerLayer: (hidden, context)
            return (self.read(output[0], layer=number, microbatch=microbatch), *output[1:])
        return self.read(output, layer=number, microbatch=microbatch)

    def read(self, hidden: Tensor, *, layer: int, microbatch: int) -> Tensor:
        """Measure STP on `hidden`, and add its gradient when the gate is open.

        Args:
            hidden: ``[s, b, h]``, with ``s >= 3``.
            layer: Global layer number.
            microbatch: Number of the microbatch within the iteration.

        Returns:
            `hidden` itself while the gate is closed; else a tensor equal to it bit for bit.
        """
        length, batch, width = hidden.shape
        iteration = self._iteration()
        key = DrawKey(
            seed=self.config.seed,
            iteration=iteration,
            microbatch=microbatch,
            data_rank=self._data_rank,
            layer=layer,
        )
        triples = draw_triples(key, length=length, batch=batch, n_spans=self.config.n_spans, device=hidden.device)
        index = (triples * batch + torch.arange(batch, device=hidden.device)).reshape(-1)
        states = hidden.detach().reshape(length * batch, width)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = states.index_select(0, index).to(dtype).view(3, -1, width)
        terms = stp_terms(rows, tolerance=torch.finfo(hidden.dtype).eps)
        self.meter.add(layer, loss=terms.loss, valid=terms.valid, triples=rows.shape[1])
        if not self.config.is_active(iteration):
            return hidden
        gradient = terms.grad.reshape(-1, width) * row_factor(self.config)
        return inject(hidden, gradient, index, self.scale)
