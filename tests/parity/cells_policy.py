"""Cells of what a run may ask of STP: taps, spans, documents, objectives, weights; and of other scales beside it."""

from __future__ import annotations

from typing import Any

from megacpp_stp.stp.config import FINAL_NORM
from tests.parity.cell import (
    CONTEXT,
    EXPERT_LOSSES,
    SEQUENCE_PARALLEL,
    TWO_RANKS,
    UNIFORM,
    Cell,
)

_NORM_TOO = (2, 7, FINAL_NORM)
# Megatron's dynamic scaler doubles after each step here and halves after one that it skips.
_SKIPPING: dict[str, Any] = {
    "microbatches": (2,) * 4,
    "skipped": 1,
    "loss_scale": (1024.0, 2048.0, 1024.0, 2048.0),
}

_TAPS = (
    Cell(name="variant A: one span, last layer, PP2", pipeline=2, taps=(10,), spans=1),
    Cell(name="variant B: three spans, last layer, PP2", pipeline=2, taps=(10,)),
    Cell(name="variant C: layers on first, middle and last stages, PP4", pipeline=4, taps=(1, 6, 10)),
    Cell(name="variant C: the same on virtual stages, PP2 x VPP2", pipeline=2, virtual=2, taps=(1, 6, 10)),
    Cell(name="one span, tap on first stage, PP2", pipeline=2, taps=(2,), spans=1),
    Cell(name="one span, tap on a middle stage, PP4", pipeline=4, taps=(4,), spans=1),
    Cell(name="final norm and layers, PP1", taps=_NORM_TOO),
    Cell(name="final norm and layers, PP2", pipeline=2, taps=_NORM_TOO, quick=True),
    Cell(name="final norm alone, PP2 x VPP2", pipeline=2, virtual=2, taps=(FINAL_NORM,)),
    Cell(name="final norm and layers, TP2 + SP", taps=_NORM_TOO, **SEQUENCE_PARALLEL),
    Cell(name="final norm alone, CP2", taps=(FINAL_NORM,), **CONTEXT),
    Cell(name="final norm and layers, full recomputation, PP2", pipeline=2, taps=_NORM_TOO, settings=UNIFORM),
    Cell(name="final norm and layers, multi-token prediction, PP2", pipeline=2, taps=_NORM_TOO, prediction="E-"),
    Cell(name="final norm and layers, per token, PP2", pipeline=2, taps=_NORM_TOO, per_token=True, masked=True),
)

_SPANS = (
    Cell(name="window of 5, PP2", pipeline=2, max_span=5),
    Cell(name="window of 5, CP2", max_span=5, **CONTEXT),
    Cell(name="documents, PP2", pipeline=2, documents=True, quick=True),
    Cell(name="documents, PP2 x VPP2", pipeline=2, virtual=2, documents=True),
    Cell(name="documents, window of 4, PP2", pipeline=2, documents=True, max_span=4),
    Cell(name="documents, DP2", documents=True, **TWO_RANKS),
    Cell(name="documents, CP2", documents=True, **CONTEXT),
    Cell(name="documents, TP2 + SP", documents=True, **SEQUENCE_PARALLEL),
    Cell(name="documents, full recomputation, PP2", pipeline=2, documents=True, settings=UNIFORM),
    Cell(name="documents, per token, PP2", pipeline=2, documents=True, per_token=True, masked=True),
    Cell(name="documents, per token, CP2", documents=True, per_token=True, masked=True, **CONTEXT),
    Cell(name="chord, PP2", pipeline=2, objective="chord"),
    Cell(name="chord, TP2 + SP", objective="chord", **SEQUENCE_PARALLEL),
    Cell(name="chord, CP2", objective="chord", **CONTEXT),
    Cell(name="chord, documents, final norm, PP2", pipeline=2, objective="chord", documents=True, taps=_NORM_TOO),
)

_WEIGHTS = (
    Cell(name="ramp over 3 steps, PP1", ramp=3),
    Cell(name="ramp over 3 steps, PP2", pipeline=2, ramp=3),
    Cell(name="ramp over 3 steps, 1, 2, 4 microbatches, PP2", pipeline=2, ramp=3, microbatches=(1, 2, 4)),
    Cell(name="gate opens in the second step, then a ramp over 2, PP2", pipeline=2, start=1, ramp=2),
    Cell(name="loss scale 1024, 512, 2048, PP2", pipeline=2, loss_scale=(1024.0, 512.0, 2048.0)),
    Cell(name="Megatron's loss scaler, a step skipped, PP1", **_SKIPPING),
    Cell(name="Megatron's loss scaler, a step skipped, PP2", pipeline=2, **_SKIPPING),
    Cell(
        name="Megatron's loss scaler, a step skipped, distributed optimizer, DP2",
        data=2,
        distributed_optimizer=True,
        **_SKIPPING,
    ),
    Cell(
        name="losses of experts and of multi-token prediction, PP2",
        pipeline=2,
        model=EXPERT_LOSSES,
        prediction="E-",
        microbatches=(4,),
    ),
    Cell(
        name="losses of experts and of multi-token prediction, per token, PP2",
        pipeline=2,
        model=EXPERT_LOSSES,
        prediction="E-",
        microbatches=(4,),
        per_token=True,
        masked=True,
    ),
    Cell(
        name="losses of experts and of multi-token prediction, loss scale 1024, PP2 x VPP2",
        pipeline=2,
        virtual=2,
        model=EXPERT_LOSSES,
        prediction="E-",
        microbatches=(4,),
        loss_scale=(1024.0,),
    ),
)

POLICY_CELLS = (*_TAPS, *_SPANS, *_WEIGHTS)
