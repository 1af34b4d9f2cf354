"""What a patch declares of itself, and the handle that takes it back."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from packaging.specifiers import SpecifierSet

from megacpp_stp.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """One place upstream that a patch covers.

    Attributes:
        id: Name in plans, receipts and of the ledger entry ``patches/<id>.yaml``.
        title: What it does, as one clause.
        why: Why no argument, spec or subclass does it.
        target: ``module:qualname`` of what is replaced.
        consumers: Who looks the target up, as ``module:qualname``; the replacement must reach each of them.
        upstream: Versions of megatron-core that it was written for, as a PEP 440 specifier.
    """

    id: str
    title: str
    why: str
    target: str
    consumers: tuple[str, ...]
    upstream: str

    def check_version(self) -> None:
        """Refuse an upstream that the patch was not written for.

        Raises:
            UserError: megatron-core is missing, or its version is out of range.
        """
        try:
            found = version("megatron-core")
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not SpecifierSet(self.upstream).contains(found, prereleases=True):
            raise UserError(
                f"the patch is for megatron-core {self.upstream}",
                field=f"patch {self.id}",
                value=found,
                fix=f"install 'megatron-core{self.upstream}'",
            )

    def resolve(self) -> tuple[Any, str]:
        """The object that holds the target, and the target's name in it."""
        module, _, qualname = self.target.partition(":")
        *path, name = qualname.split(".")
        owner: Any = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        return owner, name


class AppliedPatch(AbstractContextManager["AppliedPatch"]):
    """An applied surface; leaving the context is `undo`.

    Args:
        surface: What is covered; a function.
        replacement: Made from the original; stands in for it.

    Attributes:
        reached: Whether anything called the replacement: only then has the patch done something.
    """

    def __init__(self, surface: Surface, replacement: Callable[[Any], Callable[..., Any]]) -> None:
        self.surface = surface
        self.reached = False
        self._owner, self._name = surface.resolve()
        self._original = getattr(self._owner, self._name)
        self._replacement = self._watched(replacement(self._original))
        setattr(self._owner, self._name, self._replacement)
        self._applied = True

    @property
    def state(self) -> str:
        """``reached``, ``applied`` or ``undone``, for the receipt."""
        if not self._applied:
            return "undone"
        return "reached" if self.reached else "applied"

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.reached = True
            return function(*args, **kwargs)

        return watched

    def undo(self) -> None:
        """Put the original object back.  A second call does nothing.

        Raises:
            RuntimeError: Somebody else replaced the target since.
        """
        if not self._applied:
            return
        if getattr(self._owner, self._name) is not self._replacement:
            raise RuntimeError(f"{self.surface.target} is no longer the replacement of patch {self.surface.id}")
        setattr(self._owner, self._name, self._original)
        self._applied = False

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()
