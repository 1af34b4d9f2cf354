"""Choosing documents: a seeded order, a limit in bytes, and the split into training and validation.

The order depends on the seed and on the documents' contents only. It is the same on every machine and for
every layout of the input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_stp.data.corpus import Document
from megacpp_stp.errors import UserError


@dataclass(frozen=True)
class Split:
    """Result of `split`: the documents of the two splits."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]


def shuffle(documents: Sequence[Document], *, seed: int) -> tuple[Document, ...]:
    """Return the documents in an order drawn from the seed."""
    prefix = f"{seed}:".encode()
    return tuple(sorted(documents, key=lambda document: hashlib.sha256(prefix + document.digest).digest()))


def take_bytes(documents: Sequence[Document], *, max_bytes: int | None) -> tuple[Document, ...]:
    """Return the longest prefix of the documents with at most `max_bytes` UTF-8 bytes of text.

    Raises:
        UserError: Not even the first document fits.
    """
    if max_bytes is None:
        return tuple(documents)
    total = 0
    for count, document in enumerate(documents):
        total += document.size
        if total > max_bytes:
            if count == 0:
                raise UserError(
                    f"the first document of the shuffle alone has {total} bytes",
                    field="--max-bytes",
                    value=max_bytes,
                    fix="raise --max-bytes, or change --seed",
                )
            return tuple(documents[:count])
    return tuple(documents)


def split(documents: Sequence[Document], *, valid_fraction: float) -> Split:
    """Put the first documents, a `valid_fraction` of their number, into validation, the rest into training.

    Raises:
        UserError: A split would be empty.
    """
    count = len(documents)
    valid = round(count * valid_fraction)
    if 0 < valid < count:
        return Split(train=tuple(documents[valid:]), valid=tuple(documents[:valid]))
    if count < 2:
        fix = "add documents"
    else:
        fix = f"raise it to {1 / count:.2g} or more" if valid == 0 else "lower it to 0.5"
    raise UserError(
        f"the {'training' if valid else 'validation'} split would be empty:"
        f" the number of distinct documents is {count}",
        field="--valid-fraction",
        value=valid_fraction,
        fix=fix,
    )
