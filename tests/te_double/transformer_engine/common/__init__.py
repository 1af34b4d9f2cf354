"""A double for tests, see `tests.te_double`."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
