"""The one exception that means: the user can mend this."""

from __future__ import annotations

_UNSET = object()


class UserError(ValueError):
    """A mistake the user can mend.

    The command line prints it on one line of stderr and exits with status 2; it never shows a traceback.

    Args:
        problem: What is wrong, as one clause.
        field: Where: a recipe path (``stp.weight``), an option (``--nproc``) or a file.
        value: What was found there. Left out of the message when not given.
        fix: What to do about it, as one imperative clause.
    """

    def __init__(
        self, problem: str, *, field: str | None = None, value: object = _UNSET, fix: str | None = None
    ) -> None:
        self.problem = problem
        self.field = field
        self.value = None if value is _UNSET else value
        self.fix = fix
        text = f"{field}: {problem}" if field else problem
        if value is not _UNSET:
            text += f" (got {value!r})"
        if fix:
            text += f"\n  fix: {fix}"
        super().__init__(text)
