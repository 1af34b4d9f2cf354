"""Fp8 recipes, as Megatron makes them: what they were made with, and no more."""

from enum import Enum
from typing import Any


class Format(Enum):
    """Of an fp8 number."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class DelayedScaling(_Recipe):
    """Factors from earlier steps."""


class Float8CurrentScaling(_Recipe):
    """One factor a tensor."""


class Float8BlockScaling(_Recipe):
    """One factor a block."""
