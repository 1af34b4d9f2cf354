"""The torch backend in the place of Transformer Engine, for a build without it; only where it is asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.schema import Recipe

_NEED_TE = ("layernorm", "moe_act")
"""What selective recomputation can redo with Transformer Engine's modules alone; see `megacpp_stp.plan.checks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A recipe field that is built otherwise than the recipe says.

    Attributes:
        field: Recipe path.
        was: The recipe's value, as plain data.
        becomes: What is built.
    """

    field: str
    was: Any
    becomes: Any

    @property
    def override(self) -> str:
        """For `megacpp_stp.recipe.load_recipe`."""
        return f"{self.field}={json.dumps(self.becomes)}"

    def __str__(self) -> str:
        return f"{self.field} {json.dumps(self.was)} -> {json.dumps(self.becomes)}"


def on_torch(recipe: Recipe) -> tuple[Change, ...]:
    """What must change in a recipe for the torch backend to take it; nothing of it touches the layout."""
    return tuple(_on_torch(recipe))


def _on_torch(recipe: Recipe) -> Iterator[Change]:
    experts, training = recipe.model.families.E, recipe.training
    if recipe.model.backend == "torch":
        return
    yield Change(field="model.backend", was=recipe.model.backend, becomes="torch")
    if experts is not None and experts.grouped_gemm:
        yield Change(field="model.families.E.grouped_gemm", was=True, becomes=False)
    if training.fp8 is not None:
        yield Change(field="training.fp8", was=training.fp8.model_dump(mode="json"), becomes=None)
    if training.recompute is None:
        return
    modules = list(training.recompute.modules)
    kept = [module for module in modules if module not in _NEED_TE]
    if modules and not kept:
        yield Change(field="training.recompute", was=training.recompute.model_dump(mode="json"), becomes=None)
    elif kept != modules:
        yield Change(field="training.recompute.modules", was=modules, becomes=kept)


def require_buildable(recipe: Recipe) -> None:
    """Refuse Transformer Engine's modules where it is not installed; nothing else is built in their place.

    Raises:
        UserError: With what `on_torch` would change.
    """
    if recipe.model.backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        changes = "".join(f"\n    {change}" for change in on_torch(recipe))
        raise UserError(
            "Transformer Engine is not installed here, so its modules cannot be built",
            field="model.backend",
            value="te",
            fix="install it, or build torch modules in the same layout with --backend torch, which changes" + changes,
        )
