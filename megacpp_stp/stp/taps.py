"""Taps: where hidden states are read, measured and, once the gate is open, given the STP gradient.

Letters: s sequence, p positions of it on this rank, b batch, h hidden, K spans a sequence, m points a span,
n = K * b spans, w positions sampled for the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import FINAL_NORM, StpConfig
from megacpp_stp.stp.diagnosis import Diagnosis
from megacpp_stp.stp.layout import SequenceLayout
from megacpp_stp.stp.meter import Meter
from megacpp_stp.stp.microbatch import Announcement, Facts
from megacpp_stp.stp.sampler import DrawKey
from megacpp_stp.stp.scale import row_factor
from megacpp_stp.stp.seam import GradScale, inject
from megacpp_stp.stp.spans import draw_spans, span_terms


class Place(NamedTuple):
    """What a forward of one stage is for.

    Attributes:
        iteration: Iterations completed before it.
        microbatch: Number of the microbatch within the iteration.
        facts: What the forward step said of the microbatch.
    """

    iteration: int
    microbatch: int
    facts: Facts = Facts()


class StpTaps:
    """STP on one rank: reads the tapped layers of each stack that it is attached to.

    Args:
        config: The run's STP policy, with the taps of all stages.
        iteration: Called in forward; returns the number of iterations completed.
        data_rank: This rank's place in its data-parallel group.
        layout: This rank's share of each sequence; all of it when None.
        announcement: Knows what the forward step says of each microbatch; nothing is wanted when None.
        diagnosis: Measures in depth now and then; never when None.
    """

    def __init__(
        self,
        config: StpConfig,
        *,
        iteration: Callable[[], int],
        data_rank: int,
        layout: SequenceLayout | None = None,
        announcement: Announcement | None = None,
        diagnosis: Diagnosis | None = None,
    ) -> None:
        self.config = config
        self.scale = GradScale()
        self.meter = Meter(config.taps)
        self._iteration = iteration
        self._data_rank = data_rank
        self._layout = layout or SequenceLayout()
        self.diagnosis = diagnosis
        self._announcement = announcement or Announcement()

    def set_microbatch(self, *, tokens: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Say what STP must know of the coming microbatch; the forward step calls it, on every stage.

        Args:
            tokens: Scalar: the number of tokens that the loss function will return for this rank's part of it. Read
                under ``--calculate-per-token-loss`` alone.
            documents: ``[b, s]`` integers of the whole sequence, see `megacpp_stp.stp.documents`. Read where spans
                stay inside documents alone.
        """
        self._announcement.set(tokens=tokens, documents=documents)

    def attach(self, stack: nn.Module) -> tuple[int, ...]:
        """Tap the layers of one Megatron stage (its ``layers`` carry global numbers).

        Args:
            stack: A HybridStack, before it is wrapped in DDP.

        Returns:
            The taps on this stage; none is fine, another stage may have them.

        Raises:
            UserError: A mode in which a layer's forward hook would not run, or not as it must.
        """
        _refuse_modes(stack.config)
        tapped = {layer.layer_number: layer for layer in stack.layers if layer.layer_number in self.config.taps}
        norm = getattr(stack, "final_norm", None) if FINAL_NORM in self.config.taps else None
        if tapped or norm is not None:
            _Stage(self, stack, tuple(tapped.values()), norm)
        return (*tapped, *(() if norm is None else (FINAL_NORM,)))

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
        return Place(iteration, microbatch, self._announcement.of((iteration, microbatch, stage)))

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

    def read(self, hidden: Tensor, *, tap: int, place: Place) -> Tensor:
        """Measure STP on `hidden`, and add its gradient when the gate is open.

        All ranks that share a sequence must read: the sampled rows are summed over them.

        Args:
            hidden: ``[p, b, h]``, this rank's part of sequences of at least 3 positions.
            tap: Global layer number, or `FINAL_NORM`.
            place: What the forward is for.

        Returns:
            `hidden` itself while the gate is closed; else a tensor equal to it bit for bit.
        """
        length, batch = self._layout.whole(hidden.shape[0]), hidden.shape[1]
        spans, allowed = draw_spans(
            self.config,
            self._key(tap, place),
            length=length,
            batch=batch,
            device=hidden.device,
            documents=place.facts.documents,
        )
        allowed = None if allowed is None else allowed.reshape(-1)
        rows, index, mine = self._gather(hidden, spans, length=length)
        tolerance = torch.finfo(hidden.dtype).eps
        terms = span_terms(self.config, rows, tolerance=tolerance, allowed=allowed)
        self.meter.add(tap, loss=terms.loss, valid=terms.valid, triples=rows.shape[1], weight=place.facts.tokens)
        observer = None
        if self.diagnosis is not None and self.config.is_diagnosed(place.iteration):
            even = self.diagnosis.positions(length=length, batch=batch, device=hidden.device)
            states = self._gather(hidden, even, length=length)[0]
            self.diagnosis.add_states(
                tap, states=states, rows=rows, allowed=allowed, tolerance=tolerance, rank=place.microbatch == 0
            )
            observer = partial(self.diagnosis.add_gradient, tap)
        if not self.config.is_active(place.iteration):
            return hidden
        factor = row_factor(self.config, iteration=place.iteration, tokens=place.facts.tokens)
        gradient = terms.grad.reshape(-1, rows.shape[-1]) * factor
        # A row that another rank holds adds nothing here; it stands at position 0, so that shapes are static.
        gradient = torch.where(mine.unsqueeze(-1), gradient, 0)
        return inject(hidden, gradient, index, self.scale, observer=observer)

    def _key(self, tap: int, place: Place) -> DrawKey:
        return DrawKey(
            seed=self.config.seed,
            iteration=place.iteration,
            microbatch=place.microbatch,
            data_rank=self._data_rank,
            layer=tap,
        )

    def _gather(self, hidden: Tensor, positions: Tensor, *, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The states at positions ``[m, K, b]`` of the whole sequence.

        Returns:
            Rows ``[m, n, h]`` in fp32 or fp64; where they are among this rank's ``p * b``, ``[m * n]`` int64, and
            whether they are this rank's at all, ``[m * n]`` bool.
        """
        held, batch, width = hidden.shape
        local, mine = self._layout.locate(positions, length=length)
        index = (local * batch + torch.arange(batch, device=hidden.device)).reshape(-1)
        mine = mine.reshape(-1)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.detach().reshape(held * batch, width).index_select(0, index).to(dtype)
        return self._layout.share(rows, mine).view(positions.shape[0], -1, width), index, mine


class _Stage:
    """The hooks of one stack.

    Under full recomputation a checkpointed layer runs twice: without autograd, then again inside backward, with it.
    The second run is the one that counts, for the gradient and for the meter. By then the schedule may have named a
    later microbatch; so what the forward was for is noted when the stack ends, on its output, and brought back by the
    output's gradient, which autograd computes before it recomputes any layer of this stack and microbatch.
    """

    def __init__(
        self, taps: StpTaps, stack: nn.Module, tapped: tuple[nn.Module, ...], final_norm: nn.Module | None
    ) -> None:
        self._taps = taps
        self._layer: nn.Module = stack.layers[-1]
        self._recomputed: Place | None = None
        for layer in tapped:
            layer.register_forward_hook(self._after_layer, with_kwargs=True)
        if final_norm is not None:
            final_norm.register_forward_hook(self._after_norm)
        if stack.config.recompute_granularity == "full":
            stack.register_forward_hook(self._after_stack)

    def _after_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):  # evaluation, or the first run of a checkpointed layer
            return output
        self._taps.refuse_packed(kwargs)
        number: Any = layer.layer_number
        place = self._place_in_backward() if _in_backward() else self._taps.place(layer, stage=self)
        if isinstance(output, tuple):  # TransformerLayer: (hidden, context)
            return (self._taps.read(output[0], tap=number, place=place), *output[1:])
        return self._taps.read(output, tap=number, place=place)

    def _after_norm(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not (norm.training and torch.is_grad_enabled()):
            return None
        # Never recomputed: upstream checkpoints layers alone.
        return self._taps.read(output, tap=FINAL_NORM, place=self._taps.place(self._layer, stage=self))

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
