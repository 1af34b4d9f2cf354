"""The truth of the parity tests: plain autograd in one process, no schedule and no seam.

Letters: b batch, s sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.stp.chord import patches_of_documents, patches_of_sequence
from megacpp_stp.stp.config import FINAL_NORM
from megacpp_stp.stp.documents import Spans
from megacpp_stp.stp.reference import reference_chord_loss, reference_patches, reference_stp_loss, reference_triples
from megacpp_stp.stp.sampler import DrawKey, draw_document_triples, draw_triples, random_words
from tests.parity.cell import ITERATION, STP_SEED, WEIGHT, Cell
from tests.parity.model import build_chunks, named_parameters, run_model
from tests.parity.side import ADAM_EPS, LEARNING_RATE, Batch, Outcome, in_double, settings_of, share_of


def plain_outcome(cell: Cell, *, with_stp: bool = True) -> Outcome:
    """Gradients of ``lm_loss + weight * stp_loss`` by autograd, then torch's own AdamW.

    The losses are means over the microbatches of all data ranks, or over their tokens; the STP loss is the plain
    reference on hidden states that stay in the graph. Losses of the experts, of multi-token prediction and of the
    indexer are on upstream's own autograd functions, with the scale that makes them such means too.
    """
    (chunk,) = build_chunks(settings_of(cell), pipeline=1, layers=cell.layers, prediction=cell.prediction)
    chunk.train()
    states = _keep_states(chunk, cell.taps)
    named = dict(named_parameters(chunk))
    optimizer = torch.optim.AdamW(named.values(), lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=0.0)
    first: dict[str, Tensor] = {}
    losses: dict[int, float] = {}
    for step in range(len(cell.microbatches)):
        if step == cell.skipped:
            continue
        optimizer.zero_grad()
        by_tap = _backward(chunk, cell, step, states, with_stp=with_stp)
        if step == 0:
            losses = by_tap
            first = {name: parameter.grad.clone() for name, parameter in named.items()}
        optimizer.step()
    after = {name: parameter.detach().clone() for name, parameter in named.items()}
    return Outcome(first, after, dict.fromkeys(named), losses, (0, 0))


def plain_outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Those of several cells, in one process."""
    found = []
    for cell in cells:
        with in_double(cell):
            found.append(plain_outcome(cell))
    return found


def _backward(chunk: Any, cell: Cell, step: int, states: dict[int, Tensor], *, with_stp: bool) -> dict[int, float]:
    """One step's gradients onto the parameters; the STP loss by tap."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    batches = [
        (rank, number, batch)
        for rank in range(cell.data)
        for number, batch in enumerate(share_of(cell, step, data_rank=rank))
    ]
    tokens = sum(batch["loss_mask"].sum() for _, _, batch in batches)
    for upstream in (MoEAuxLossAutoScaler, MTPLossAutoScaler, DSAIndexerLossAutoScaler):
        upstream.set_loss_scale(torch.full((1,), 1.0 / float(tokens if cell.per_token else len(batches))))
    by_tap = dict.fromkeys(cell.taps, 0.0)
    for rank, number, batch in batches:
        mask = batch["loss_mask"]
        share = mask.sum() / tokens if cell.per_token else 1.0 / len(batches)
        total = (run_model(chunk, batch) * mask).sum() / mask.sum() * share
        if with_stp:
            terms = _stp_terms(states, cell, batch, step=step, microbatch=number, data_rank=rank)
            total = total + _weight(cell, step) * torch.stack(list(terms.values())).mean() * share
            for tap, term in terms.items():
                by_tap[tap] += float(term * share)
        total.backward()
    return by_tap


def _keep_states(chunk: Any, taps: tuple[int, ...]) -> dict[int, Tensor]:
    states: dict[int, Tensor] = {}

    def keep_as(tap: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            states[tap] = output[0] if isinstance(output, tuple) else output

        return keep

    tapped = {layer.layer_number: layer for layer in chunk.decoder.layers} | {FINAL_NORM: chunk.decoder.final_norm}
    for tap in taps:
        tapped[tap].register_forward_hook(keep_as(tap))
    return states


def _weight(cell: Cell, step: int) -> float:
    """The weight of a step, without a look at the run's policy."""
    since = step - cell.start + 1
    return WEIGHT * min(max(since, 0), max(cell.ramp, 1)) / max(cell.ramp, 1)


def _stp_terms(
    states: dict[int, Tensor], cell: Cell, batch: Batch, *, step: int, microbatch: int, data_rank: int
) -> dict[int, Tensor]:
    """The STP loss of each tap."""
    reference = reference_chord_loss if cell.objective == "chord" else reference_stp_loss
    losses = {}
    for tap in cell.taps:
        key = DrawKey(STP_SEED, ITERATION + step, microbatch, data_rank, tap)
        spans = _drawn(cell, key, batch["documents"])
        hidden = states[tap]
        losses[tap] = reference(hidden, spans, tolerance=torch.finfo(hidden.dtype).eps)
    return losses


def _drawn(cell: Cell, key: DrawKey, documents: Tensor) -> list[tuple[int, ...]]:
    """The spans of a tap, ``(sequence, position, ...)`` each, and all of them as the cell allows."""
    found = _draw(cell, key, documents)
    spans = []
    for sequence, numbers in enumerate(documents.tolist()):
        inside = tuple(numbers) if cell.documents else (0,) * len(numbers)
        every = _every_allowed(cell.objective, cell.max_span, inside)
        for k in range(cell.spans):
            assert bool(found.allowed[k, sequence]) == bool(every)
            if every:
                span = tuple(found.positions[:, k, sequence].tolist())
                assert span in every, (span, numbers)
                spans.append((sequence, *span))
    return spans


def _draw(cell: Cell, key: DrawKey, documents: Tensor) -> Spans:
    batch, length = documents.shape
    if cell.objective == "chord":
        words = random_words(key, n_spans=cell.spans, batch=batch, device=documents.device)
        if cell.documents:
            return patches_of_documents(words, documents)
        positions = patches_of_sequence(words, length=length)
    elif cell.documents:
        return draw_document_triples(key, documents, n_spans=cell.spans, max_span=cell.max_span)
    else:
        positions = draw_triples(
            key, length=length, batch=batch, n_spans=cell.spans, device=documents.device, max_span=cell.max_span
        )
    return Spans(positions, torch.ones_like(positions[0], dtype=torch.bool))


@cache
def _every_allowed(objective: str, max_span: int | None, documents: tuple[int, ...]) -> frozenset[tuple[int, ...]]:
    """All spans of a sequence that are allowed, by looking at each."""
    if objective == "chord":
        return frozenset(reference_patches(documents))
    return frozenset(reference_triples(documents, max_span=max_span))
