"""Surface ``dataset-helpers``: take the wheel's prebuilt dataset index builder for what it is, built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.patches.contract import Hits, Plan, Probe, Replacement, Surface

_TARGET = "megatron.core.datasets.utils:compile_helpers"
_CONSUMER = "megatron.training.initialize:_compile_dependencies"
_EXTENSION = "megatron.core.datasets.helpers_cpp"
# What megatron.core.datasets calls in the extension.
_FUNCTIONS = (
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "build_sample_idx_int32",
    "build_sample_idx_int64",
)


def _unneeded(plan: Plan) -> None:
    """Every run initialises Megatron, which compiles."""


def _replace(originals: Mapping[str, Any], hits: Hits) -> dict[str, Replacement]:
    def compile_helpers() -> None:
        """Stand-in for upstream's: the extension is there, whole, or the run ends with how to get it."""
        _verify_extension()

    return {_TARGET: Replacement(value=compile_helpers)}


def _probe(probe: Probe) -> str:
    probe.through[_TARGET][_CONSUMER]()
    return f"returned without make, after {_EXTENSION} had loaded with all {len(_FUNCTIONS)} functions"


def _verify_extension() -> None:
    try:
        extension = importlib.import_module(_EXTENSION)
    except ImportError as error:
        raise UserError(
            f"megatron-core's dataset index builder does not load: {error}",
            field=_EXTENSION,
            fix="install the megatron-core wheel for this Python and platform, or run make in its core/datasets",
        ) from error
    missing = [name for name in _FUNCTIONS if not callable(getattr(extension, name, None))]
    if missing:
        raise UserError(
            "megatron-core's dataset index builder is from another version: no " + ", ".join(missing),
            field=_EXTENSION,
            fix="reinstall megatron-core, or run make in its core/datasets",
        )


SURFACE = Surface(id="dataset-helpers", unneeded=_unneeded, replace=_replace, probe=_probe)
