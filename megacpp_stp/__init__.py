"""Train the NAM hybrid language models on Megatron-Core, with STP under every pipeline layout.

Importing this package imports no torch: recipes and plans are for laptops too.
"""

from __future__ import annotations

__version__ = "0.1.0"

_LAZY = {
    "load_recipe": "megacpp_stp.recipe",
    "build_plan": "megacpp_stp.plan",
    "compute_stp_loss": "megacpp_stp.stp",
}

__all__ = ["__version__", "build_plan", "compute_stp_loss", "load_recipe"]


def __getattr__(name: str) -> object:
    """Resolve the public functions on first use, so that the planner never pays for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
