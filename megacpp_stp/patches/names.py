"""How the ledger names things upstream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_IDENTIFIER = r"[A-Za-z_]\w*"
_DOTTED = rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*"
NAME = rf"{_DOTTED}:{_DOTTED}"
TARGET = rf"{NAME}(?:\[[^\[\]]+\])?"
_IMPORT = rf"from ({_DOTTED}) import ({_IDENTIFIER})"
THROUGH = rf"(?:{_DOTTED}|{_IMPORT})"


@dataclass(frozen=True, slots=True)
class Target:
    """What a surface replaces: ``module:qualname``, or ``module:TABLE[key]`` for one entry of a table.

    Attributes:
        module: Where it is.
        path: Names from the module down to it.
        key: Of the table's entry; None for what is no entry.
    """

    module: str
    path: tuple[str, ...]
    key: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name that matches `TARGET`."""
        assert re.fullmatch(TARGET, text), text
        place, _, key = text.partition("[")
        module, _, qualname = place.partition(":")
        return cls(module, tuple(qualname.split(".")), key.removesuffix("]") or None)

    @property
    def is_module_level(self) -> bool:
        """Whether it is a module's own name, or in a table that is one: other modules can import it."""
        return len(self.path) == 1


@dataclass(frozen=True, slots=True)
class Route:
    """How a consumer comes by a target.

    Attributes:
        path: Names in the consumer's globals, as ``tensor_parallel.vocab_parallel_cross_entropy``; or what an import
            statement in its body imports.
        module: Of that import; None for its globals.
    """

    path: tuple[str, ...]
    module: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a route that matches `THROUGH`."""
        if (found := re.fullmatch(_IMPORT, text)) is not None:
            return cls((found[2],), found[1])
        assert re.fullmatch(_DOTTED, text), text
        return cls(tuple(text.split(".")), None)
