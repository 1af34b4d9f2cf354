"""Places of a machine, as they stand in values: left out of what strangers read."""

from __future__ import annotations

import re

PLACE = "(a place)"
# Of a machine, not of a project: absolute, of a home folder, or behind a scheme.
_PLACE = re.compile(r"(^|[\s:=,;'\"\[{(])[/~]")


def has_place(value: str) -> bool:
    """Whether a value names one."""
    return bool(_PLACE.search(value))


def without_place(override: str) -> str:
    """What ``--set`` was given, its value left out where it names a place; the plan keeps it."""
    path, separator, value = override.partition("=")
    return f"{path}{separator}{PLACE}" if has_place(value) else override
