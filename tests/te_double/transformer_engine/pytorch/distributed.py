"""The names that Megatron imports."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class CudaRNGStatesTracker:
    """A name only: Megatron derives a class from it."""


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Nothing: it is for fp8."""
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    """Never."""
    return False
