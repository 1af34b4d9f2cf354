"""Regions of fp8, without its numbers: which recipe is in force when a product is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


class FP8GlobalStateManager:
    """What holds here and now."""

    recipes: list[Any] = []

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether the innermost region is one of fp8."""
        return bool(cls.recipes) and cls.recipes[-1] is not None


@contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None
) -> Iterator[None]:
    """A region; regions nest, and the innermost one holds."""
    assert not calibrating and (fp8_recipe is not None or not enabled)
    FP8GlobalStateManager.recipes.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        FP8GlobalStateManager.recipes.pop()


def fp8_model_init(enabled: bool = True, **kwargs: Any) -> AbstractContextManager[None]:
    """Nothing: weights stay bf16."""
    assert not enabled
    return nullcontext()
