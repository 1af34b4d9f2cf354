"""Taps: where hidden states are read, measured and, once the gate is open, given the STP gradient.

Letters: s sequence, p positions of it on this rank, b batch, h hidden, K spans a sequence, n = K * b triples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.layout import SequenceLayout
from megacpp_stp.stp.meter import Meter
from megacpp_stp.stp.objective import stp_terms
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from megacpp_stp.stp.scale import row_factor
from megacpp_stp.stp.seam import GradScale, inject
from megacpp_stp.stp.tokens import TokenCount


class Place(NamedTuple):
    """What a forward of one stage is for.

    Attributes:
        iteration: Iterations completed before it.
        microbatch: Number of the microbatch within the iteration.
        tokens: How many of its tokens count, a 0-dim tensor; None without per-token loss.
    """

    iteration: int
    microbatch: int
    tokens: Tensor | None = None


class StpTaps:
    """STP on one rank: reads the tapped layers of each stack that it is attached to.

    Args:
        config: The run's STP policy, with the taps of all stages.
        iteration: Called in forward; returns the number of iterations completed.
        data_rank: This rank's place in its data-parallel group.
        layout: This rank's share of each sequence; all of it when None.
        tokens: Counts the tokens of each microbatch under per-token loss; not counted when None.
    """

    def __init__(
        self,
        config: StpConfig,
        *,
        iteration: Callable[[], int],
        data_rank: int,
        layout: SequenceLayout | None = None,
        tokens: TokenCount | None = None,
    ) -> None:
        self.config = config
        self.scale = GradScale()
        self.meter = Meter(config.taps)
        self._iteration = iteration
        self._data_rank = data_rank
        self._layout = layout or SequenceLayout()
        self._tokens = tokens or TokenCount(wanted=False)

    def set_tokens(self, count: Tensor) -> None:
        """Say how many tokens of the coming microbatch count; the forward step calls it, on every stage.

        It does nothing without ``--calculate-per-token-loss``.

        Args:
            count: Scalar: the number of tokens that the loss function will return for this rank's part of it.
        """
        self._tokens.set(count)

    def attach(self, stack: nn.Module) -> tuple[int, ...]:
        """Tap the layers of one Megatron stage (its ``layers`` carry global numbers).

        Args:
            stack: A HybridStack, before it is wrapped in DDP.

        Returns:
            The layer numbers tapped on this stage; none is fine, another stage may have them.

        Raises:
            UserError: A mode in which a layer's forward hook would not run, or not as it must.
        """
        _refuse_modes(stack.config)
        tapped = [layer for layer in stack.layers if layer.layer_number in self.config.taps]
        if tapped:
            _Stage(self, stack, tapped)
        return tuple(layer.layer_number for layer in tapped)

    def place(self, layer: nn.Module, *, stage: object) -> Place:
        """What the forward that `layer` is in is for.

        Raises:
            UserError: The schedule or the forward step left it unsaid.
        """
        # Written onto each layer by the schedules before its forward (cuda_graphs.py, set_current_microbatch).
        microbatch: Any = getattr(layer, "current_microbatch", None)
        if microbatch is None:
            raise UserError(
                f"the schedule did not say which microbatch layer {layer.layer_number} is running",
                field="stp",
                fix="use megatron-core's own schedules, 0.19 or newer",
            )
        iteration = self._iteration()
        return Place(iteration, microbatch, self._tokens.of((iteration, microbatch, stage)))

    def refuse_packed(self, kwargs: dict[str, Any]) -> None:
        """Whether a layer's arguments leave the owner of each position known.

        Raises:
            UserError: Packed sequences under context parallelism, which may be split document by document.
        """
        if self._layout.context_size > 1 and kwargs.get("packed_seq_params") is not None:
            raise UserError(
                "STP does not know which context-parallel rank holds a position of packed sequences",
                field="--context-parallel-size",
                value=self._layout.context_size,
                fix="use 1, or unpacked samples",
            )

    def read(self, hidden: Tensor, *, layer: int, place: Place) -> Tensor:
        """Measure STP on `hidden`, and add its gradient when the gate is open.

        All ranks that share a sequence must read: the sampled rows are summed over them.

        Args:
            hidden: ``[p, b, h]``, this rank's part of sequences of at least 3 positions.
            layer: Global layer number.
            place: What the forward is for.

        Returns:
            `hidden` itself while the gate is closed; else a tensor equal to it bit for bit.
        """
        held, batch, width = hidden.shape
        length = self._layout.whole(held)
        key = DrawKey(
            seed=self.config.seed,
            iteration=place.iteration,
            microbatch=place.microbatch,
            data_rank=self._data_rank,
            layer=layer,
        )
        triples = draw_triples(key, length=length, batch=batch, n_spans=self.config.n_spans, device=hidden.device)
        local, mine = self._layout.locate(triples, length=length)
        index = (local * batch + torch.arange(batch, device=hidden.device)).reshape(-1)
        mine = mine.reshape(-1)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.detach().reshape(held * batch, width).index_select(0, index).to(dtype)
        rows = self._layout.share(rows, mine).view(3, -1, width)
        terms = stp_terms(rows, tolerance=torch.finfo(hidden.dtype).eps)
        self.meter.add(layer, loss=terms.loss, valid=terms.valid, triples=rows.shape[1], weight=place.tokens)
        if not self.config.is_active(place.iteration):
            return hidden
        gradient = terms.grad.reshape(-1, width) * row_factor(self.config, tokens=place.tokens)
        # A row that another rank holds adds nothing here; it stands at position 0, so that shapes are static.
        return inject(hidden, torch.where(mine.unsqueeze(-1), gradient, 0), index, self.scale)


class _Stage:
    """The hooks of one stack.

    Under full recomputation a checkpointed layer runs twice: without autograd, then again inside backward, with it.
    The second run is the one that counts, for the gradient and for the meter. By then the schedule may have named a
    later microbatch; so what the forward was for is noted when the stack ends, on its output, and brought back by the
    output's gradient, which autograd computes before it recomputes any layer of this stack and microbatch.
    """

    def __init__(self, taps: StpTaps, stack: nn.Module, tapped: list[nn.Module]) -> None:
        self._taps = taps
        self._layer = tapped[0]
        self._recomputed: Place | None = None
        for layer in tapped:
            layer.register_forward_hook(self._after_layer, with_kwargs=True)
        if stack.config.recompute_granularity == "full":
            stack.register_forward_hook(self._after_stack)

    def _after_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):  # evaluation, or the first run of a checkpointed layer
            return output
        self._taps.refuse_packed(kwargs)
        number: Any = layer.layer_number
        place = self._place_in_backward() if _in_backward() else self._taps.place(layer, stage=self)
        if isinstance(output, tuple):  # TransformerLayer: (hidden, context)
            return (self._taps.read(output[0], layer=number, place=place), *output[1:])
        return self._taps.read(output, layer=number, place=place)

    def _after_stack(self, stack: nn.Module, args: Any, output: Tensor) -> None:
        if not (stack.training and output.requires_grad):
            return
        place = self._taps.place(self._layer, stage=self)

        def bring_back(grad: Tensor) -> None:
            self._recomputed = place

        output.register_hook(bring_back)

    def _place_in_backward(self) -> Place:
        assert self._recomputed is not None, "a layer ran in backward before its stack's gradient"
        return self._recomputed


def _in_backward() -> bool:
    """Whether autograd is in a backward on this thread, by the number that torch.utils.checkpoint asks for too."""
    return torch._C._current_graph_task_id() != -1


def _refuse_modes(transformer_config: Any) -> None:
    if transformer_config.recompute_granularity == "full" and (transformer_config.fp8 or transformer_config.fp4):
        raise UserError(
            "taps under full activation recomputation with fp8 or fp4, which is Transformer Engine's, are not proven",
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
