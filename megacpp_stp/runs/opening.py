"""Opening a file of a run directory that anybody may have made."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import shown

_FIX = "is this a run directory?"


def require_regular(path: Path) -> None:
    """Refuse what is there and is no regular file: reading a pipe would wait for ever.

    Raises:
        UserError: With the file. One that is not there passes.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _cannot_be_read(path, error) from None
    if not stat.S_ISREG(mode):
        raise UserError("is no regular file", field=shown(path), fix=_FIX)


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file and read from it in the block.

    Raises:
        UserError: It cannot be opened or read, or is none.
    """
    with open_regular(path) as handle:
        try:
            yield handle
        except OSError as error:
            raise _cannot_be_read(path, error) from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        UserError: It cannot be opened, or is none.
    """
    require_regular(path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise _cannot_be_read(path, error) from None


def _cannot_be_read(path: Path, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or "no file has such a name"
    return UserError(f"cannot be read: {reason}", field=shown(path), fix=_FIX)
