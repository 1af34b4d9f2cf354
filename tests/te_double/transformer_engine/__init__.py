"""A double for tests, see `tests.te_double`; not Transformer Engine."""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.20.2"
