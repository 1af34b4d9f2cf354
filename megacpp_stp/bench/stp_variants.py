"""Ways to give a hidden state the STP gradient, and the stream that they are put into.

Letters: s sequence, b batch, h hidden, K spans a sequence, n = K * b triples.

The stream is the piece of a model around a tap, as cheap as it can be: an operation that makes the hidden state, the
tap, two residual blocks, and the gradient that comes back from all later work:

    tapped = tap(x * gate)
    later = tapped + tapped * gate
    later = later + later * gate

Backward meets at the tap what it meets in a model: a gradient of the hidden state's size, summed from two branches.
The stream itself keeps nothing of that size for backward, so whatever a way keeps is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.sampler import DrawKey, draw_triples
from megacpp_stp.stp.states import compute_dtype
from megacpp_stp.stp.taps import Place, StpTaps

NONE, SEAM, TEXTBOOK, INDEX_SELECT, AUTO_SCALER = "no STP", "seam", "textbook", "index_select", "auto-scaler"
"""Names of the ways, see `ways`."""

_KEY = DrawKey(seed=1, iteration=0, microbatch=0, data_rank=0, layer=1)
_WEIGHT = 0.5

Way = Callable[[Tensor], tuple[Tensor, Callable[[], Tensor] | None]]
"""Takes the hidden state; returns what goes on to later work, and what gives a loss to add to the main one, if any.

A loss is added where the main one is, at the end; there autograd begins, and so holds its gradient all the way back.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        length: s.
        batch: b.
        width: h.
        n_spans: K.
        dtype: Of the hidden states.
    """

    length: int
    batch: int
    width: int
    n_spans: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def seam_bytes(self) -> int:
        """What the seam keeps for backward: 3 K b rows of fp32 (fp64 for fp64 states), each with an int64 index."""
        return 3 * self.n_spans * self.batch * (self.width * compute_dtype(self.dtype).itemsize + 8)


class Stream:
    """The tensors around a tap.

    Args:
        case: Their sizes.
        device: Where they are.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        random = torch.Generator(device).manual_seed(0)
        shape = (case.length, case.batch, case.width)
        self.x = torch.randn(shape, generator=random, dtype=case.dtype, device=device).requires_grad_()
        self._gate = torch.rand(case.width, generator=random, dtype=case.dtype, device=device) + 0.5
        self._incoming = torch.randn(shape, generator=random, dtype=case.dtype, device=device)

    def forward(self, way: Way) -> list[Tensor]:
        """The ends to go back from: the later work's result, and the loss beside it, if any."""
        later, loss = way(self.x * self._gate)
        for _ in range(2):
            later = later + later * self._gate
        return [later] if loss is None else [later, loss()]

    def backward(self, ends: list[Tensor]) -> None:
        """Set ``x.grad``."""
        self.x.grad = None
        torch.autograd.backward(ends, [self._incoming, *(torch.ones_like(end) for end in ends[1:])])


def ways(case: Case, device: torch.device) -> dict[str, Way]:
    """The ways by name, all with the same triples and weight.

    * no STP
    * seam: all that a tap runs in training, drawing the triples and feeding the meter included. The other ways get
      theirs for nothing and measure nothing, so the comparison errs against the seam.
    * textbook: the states at s, r and t by one indexing each, under autograd; the loss is added to the main one.
    * index_select: the same from one gather of all rows.
    * auto-scaler: the loss of index_select, hung on the hidden state at the tap by megatron-core's
      `MoEAuxLossAutoScaler`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of megatron-core, about packages that nothing here needs
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    triples = draw_triples(_KEY, length=case.length, batch=case.batch, n_spans=case.n_spans, device=device)
    sequence = torch.arange(case.batch, device=device)
    index = (triples * case.batch + sequence).reshape(-1)

    def gathers(hidden: Tensor) -> Tensor:
        return _loss(*(hidden[positions, sequence].flatten(0, 1) for positions in triples))

    def one_gather(hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, case.width).index_select(0, index)
        return _loss(*rows.view(3, -1, case.width))

    # As a pipeline schedule does for each microbatch.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=device))
    return {
        NONE: lambda hidden: (hidden, None),
        SEAM: _seam(case, device),
        TEXTBOOK: lambda hidden: (hidden, lambda: gathers(hidden)),
        INDEX_SELECT: lambda hidden: (hidden, lambda: one_gather(hidden)),
        AUTO_SCALER: lambda hidden: (MoEAuxLossAutoScaler.apply(hidden, one_gather(hidden)), None),
    }


def _seam(case: Case, device: torch.device) -> Way:
    config = StpConfig(weight=_WEIGHT, n_spans=case.n_spans, start_step=0, taps=(_KEY.layer,), seed=_KEY.seed)
    taps = StpTaps(config, iteration=lambda: _KEY.iteration, data_rank=_KEY.data_rank)
    taps.scale.set(torch.ones((), device=device))
    place = Place(_KEY.iteration, _KEY.microbatch)
    return lambda hidden: (taps.read(hidden, tap=_KEY.layer, place=place), None)


def _loss(h_s: Tensor, h_r: Tensor, h_t: Tensor) -> Tensor:
    """The weighted loss of rows ``[n, h]``, as one writes it down; no care for degenerate triples, which costs too."""
    dtype = compute_dtype(h_s.dtype)
    h_s, h_r, h_t = h_s.to(dtype), h_r.to(dtype), h_t.to(dtype)
    cosine = torch.nn.functional.cosine_similarity(h_r - h_s, h_t - h_r, dim=-1)
    return _WEIGHT * (1 - cosine).mean()
