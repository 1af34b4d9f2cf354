"""Without fp8: the names that Megatron imports."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class FP8GlobalStateManager:
    """There is never an fp8 region."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never."""
        return False


def fp8_autocast(enabled: bool = True, **kwargs: Any) -> AbstractContextManager[None]:
    """Nothing."""
    assert not enabled
    return nullcontext()


def fp8_model_init(enabled: bool = True, **kwargs: Any) -> AbstractContextManager[None]:
    """Nothing."""
    assert not enabled
    return nullcontext()
