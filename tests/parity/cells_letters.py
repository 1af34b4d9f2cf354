"""Cells of the recurrent letters and of sparse attention: Mamba-3 and M2RNN in Megatron's Mamba slots, and DSA.

The loss of sparse attention's indexer takes its scale from the slot of the configuration that STP takes its own from.
"""

from __future__ import annotations

from typing import Any

from megacpp_stp.stp.config import FINAL_NORM
from tests.parity.cell import IN_DOUBLE, SPLIT_SUMS, TWO_RANKS, UNIFORM, Cell

# Layers 2 and 7 are Mamba-3, 4 and 9 M2RNN, 1 and 8 sparse attention: each kind on both of two stages.
LETTERS = ("DM", "EM+", "-M", "DM-")
_TAPS = (1, 4, 7, 8)  # D, R, M, D, one on each segment
_EVERY: dict[str, Any] = {"layers": LETTERS, "taps": _TAPS}
# fp32's rounding shows first in small gradients: plain autograd's own of M2RNN's A_log and dt_bias are up to 4e-6 from
# those in fp64. The cells in fp64 have none of it.
_ROUNDED: dict[str, Any] = {**_EVERY, "tolerance": 5e-6}
_SPLIT: dict[str, Any] = {**_ROUNDED, "tensor": 2, "sequence_parallel": True, "after": SPLIT_SUMS}
SPARSE_KEYS = {"dsa_indexer_topk": 12}

LETTER_CELLS = (
    Cell(name="letters, PP1", **_ROUNDED),
    Cell(name="letters, PP2", pipeline=2, quick=True, **_ROUNDED),
    Cell(name="letters, PP4", pipeline=4, **_ROUNDED),
    Cell(name="letters, PP2 x VPP2", pipeline=2, virtual=2, **_ROUNDED),
    Cell(name="letters, TP2 + SP", **_SPLIT),
    Cell(name="letters, PP2 x TP2 + SP", pipeline=2, **_SPLIT),
    Cell(name="letters, DP2", **TWO_RANKS, **_ROUNDED),
    Cell(name="letters, DP2, distributed optimizer", distributed_optimizer=True, **TWO_RANKS, **_ROUNDED),
    Cell(name="letters, EP2", expert=2, **TWO_RANKS, **_ROUNDED),
    Cell(name="letters, 12 of 24 keys, PP2", pipeline=2, microbatches=(4,), model=SPARSE_KEYS, **_ROUNDED),
    Cell(name="letters, per token, PP2", pipeline=2, per_token=True, masked=True, **_ROUNDED),
    Cell(name="letters, full recomputation, PP2", pipeline=2, settings=UNIFORM, **_ROUNDED),
    Cell(name="letters, loss scale 1024, 512, 2048, PP2", pipeline=2, loss_scale=(1024.0, 512.0, 2048.0), **_ROUNDED),
    Cell(
        name="letters, documents, final norm, PP2",
        pipeline=2,
        documents=True,
        **{**_ROUNDED, "taps": (*_TAPS, FINAL_NORM)},
    ),
    Cell(name="letters, fp64, PP2", pipeline=2, **IN_DOUBLE, **_EVERY),
    Cell(name="letters, full recomputation, fp64, PP2", pipeline=2, settings=UNIFORM, **IN_DOUBLE, **_EVERY),
    Cell(name="letters, documents, fp64, PP2", pipeline=2, documents=True, **IN_DOUBLE, **_EVERY),
    Cell(name="letters, fp64, TP2 + SP", tensor=2, sequence_parallel=True, **IN_DOUBLE, **_EVERY),
)
