"""Patch ``dataset-helpers``: take the wheel's prebuilt dataset index builder for what it is, built."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.patches.surface import AppliedPatch, Surface

SURFACE = Surface(
    id="dataset-helpers",
    title="check the prebuilt dataset index builder instead of running make",
    why="compile_helpers() takes no argument and ends the process where the folder has no Makefile, as in the wheel",
    target="megatron.core.datasets.utils:compile_helpers",
    consumers=("megatron.training.initialize:_compile_dependencies",),
    upstream=">=0.19.2,<0.20",
)

_EXTENSION = "megatron.core.datasets.helpers_cpp"
# What megatron.core.datasets calls in the extension.
_FUNCTIONS = (
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "build_sample_idx_int32",
    "build_sample_idx_int64",
)


def apply() -> AppliedPatch:
    """Replace ``compile_helpers``.

    Returns:
        The handle that undoes it; also a context manager.

    Raises:
        UserError: This megatron-core is not the one that the patch was written for.
    """
    SURFACE.check_version()
    return AppliedPatch(SURFACE, _replacement)


def eligible() -> bool:
    """Whether the patch does anything here: a source checkout has a Makefile, and make is then right."""
    return not (_folder() / "Makefile").exists()


def _replacement(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        """Stand-in for upstream's: verify the prebuilt extension, or build where there is a Makefile."""
        if eligible():
            _verify_extension()
        else:
            original()

    return compile_helpers


def _folder() -> Path:
    utils = importlib.import_module("megatron.core.datasets.utils")
    assert utils.__file__ is not None
    return Path(utils.__file__).parent


def _verify_extension() -> None:
    try:
        extension = importlib.import_module(_EXTENSION)
    except ImportError as error:
        raise UserError(
            f"megatron-core's dataset index builder does not load: {error}",
            field=_EXTENSION,
            fix="install the megatron-core wheel for this Python and platform",
        ) from error
    missing = [name for name in _FUNCTIONS if not callable(getattr(extension, name, None))]
    if missing:
        raise UserError(
            "megatron-core's dataset index builder is from another version: no " + ", ".join(missing),
            field=_EXTENSION,
            fix="reinstall megatron-core",
        )
