"""The user error that survives being raised inside Megatron's ``build_module``."""

from __future__ import annotations

from megacpp_stp.errors import UserError

_SUFFIX = " when instantiating "


class BuildError(UserError):
    """A mistake the user can mend, found while a module is built.

    ``build_module`` raises an exception anew as ``type(e)(f"{e} when instantiating <class>")``, once for each level
    of nesting; the message stays what it was.  The attributes do not survive that.
    """

    def __init__(self, problem: str, **details: object) -> None:
        super().__init__(problem.partition(_SUFFIX)[0], **details)  # type: ignore[arg-type]
