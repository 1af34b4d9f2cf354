"""report.html of a matrix: renewed where we wrote it and nobody has changed it since, and else left alone.

The page says the sha256 of itself, taken with zeros in its place: that is how it is known again.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from megacpp_stp.errors import UserError

_BLANK = b"0" * 64
_MARK = re.compile(rb'<meta name="megacpp-stp-ablate" content="sha256:([0-9a-f]{64})">')
MARK = f'<meta name="megacpp-stp-ablate" content="sha256:{_BLANK.decode()}">'
_MOST_BYTES = 2**28
_MARK_WITHIN = 2048


def put_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all. The caller holds the lock of its directory.

    Args:
        path: Where.
        text: It holds `MARK` once, near its beginning.

    Raises:
        UserError: What lies there is not ours, or was changed; or it cannot be written.
    """
    content = _sealed(text.encode())
    try:
        there = os.path.lexists(path)
        if there and not _is_ours(path):
            raise UserError(
                f"{path} is not as an ablation wrote it, and is left as it is",
                field="report.html",
                value=str(path),
                fix="it may say what is no longer so; move it away, and --resume writes the page",
            )
        _put(path, content, replace=there)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}",
            field="report.html",
            value=str(path),
            fix="make its directory one that you may write to",
        ) from None


def _sealed(content: bytes) -> bytes:
    found = _MARK.search(content, 0, _MARK_WITHIN)
    assert found is not None and found[1] == _BLANK, "a page without its mark"
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: found.start(1)] + digest + content[found.end(1) :]


def _is_ours(path: Path) -> bool:
    """Whether a page is, byte for byte, one that `put_page` wrote."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES)
    found = _MARK.search(content, 0, _MARK_WITHIN)
    if found is None:
        return False
    blank = content[: found.start(1)] + _BLANK + content[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


def _put(path: Path, content: bytes, *, replace: bool) -> None:
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link never replaces what came to lie there meanwhile.
        (os.replace if replace else os.link)(draft, path)
    finally:
        with suppress(OSError):
            os.unlink(draft)
