"""Finding text files and reading documents from them: one per file, or one per line of `.jsonl`."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacpp_stp.errors import UserError

# The index stores document lengths as int32, and a document has at most one token more than bytes.
_MAX_DOCUMENT_BYTES = 2**31 - 2


@dataclass(frozen=True, slots=True)
class Document:
    """Where one document lies and what it holds.

    Attributes:
        path: The file.
        line: Line number from 1 in a `.jsonl` file; None when the document is the whole file.
        offset: Where the file or line begins, in bytes.
        length: Bytes of the file or line.
        size: UTF-8 bytes of the text.
        digest: SHA-256 of the text's UTF-8 bytes.
    """

    path: Path
    line: int | None
    offset: int
    length: int
    size: int
    digest: bytes

    @property
    def place(self) -> str:
        """The file, and the line where there is one, for messages."""
        return _place(self.path, self.line)


@dataclass(frozen=True)
class FoundFiles:
    """Result of `find_files`: the files to read, and the number of entries left out by reason."""

    files: tuple[Path, ...]
    skipped: Counter[str]


@dataclass(frozen=True)
class Corpus:
    """Result of `scan`.

    Attributes:
        documents: The distinct documents, in the order they were met.
        duplicates: Documents left out since an earlier one has the same bytes.
        skipped: Documents left out, by reason.
        files: Number of files read.
        bytes: Their size.
        sha256: SHA-256 over the sorted SHA-256 digests of the files, in hex.
    """

    documents: tuple[Document, ...]
    duplicates: int
    skipped: Counter[str]
    files: int
    bytes: int
    sha256: str


class _Undecodable(Exception):
    """The text is not UTF-8."""


def display(path: Path) -> str:
    """Return a path as printable text, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def real_path(path: Path) -> Path:
    """Return the absolute path without symbolic links; unlike `Path.resolve` it accepts loops of them."""
    return Path(os.path.realpath(path))


def _place(path: Path, line: int | None) -> str:
    return display(path) if line is None else f"{display(path)}:{line}"


def find_files(inputs: Sequence[Path], *, suffixes: Sequence[str]) -> FoundFiles:
    """List the files to read.

    An input that is a file is always taken. A directory is searched recursively, sorted by relative path;
    hidden entries, symbolic links and names that end in none of the suffixes are left out and counted.

    Args:
        inputs: Files and directories.
        suffixes: Endings such as ".hpp"; empty takes every file.

    Raises:
        UserError: An input is missing or is neither file nor directory, a directory cannot be listed, or
            there is nothing to read.
    """
    files: dict[Path, None] = {}
    skipped: Counter[str] = Counter()
    for root in inputs:
        try:
            mode = root.stat().st_mode
        except OSError as error:
            raise UserError(
                f"the input cannot be read: {error.strerror}",
                field="INPUT",
                value=display(root),
                fix="name an existing file or directory",
            ) from error
        if stat.S_ISREG(mode):
            files[real_path(root)] = None
        elif stat.S_ISDIR(mode):
            found = _walk(real_path(root), suffixes=tuple(suffixes), skipped=skipped)
            files.update(dict.fromkeys(sorted(found, key=lambda path: path.as_posix())))
        else:
            raise UserError(
                "the input is neither a file nor a directory",
                field="INPUT",
                value=display(root),
                fix="name a regular file or a directory",
            )
    if not files:
        wanted = f"ends in {' or '.join(suffixes)}" if suffixes else "is a regular, visible file"
        names = ", ".join(display(root) for root in inputs)
        raise UserError(
            f"no matching files: nothing below it {wanted}",
            field="INPUT",
            value=names,
            fix="name another directory" + (", or other --suffix values" if suffixes else ""),
        )
    return FoundFiles(files=tuple(files), skipped=skipped)


def _walk(root: Path, *, suffixes: tuple[str, ...], skipped: Counter[str]) -> Iterator[Path]:
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                listed = list(entries)
        except OSError as error:
            raise _unreadable(directory, error) from error
        for entry in listed:
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_symlink():
                skipped["symlink"] += 1
            elif entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                skipped["not_regular_file"] += 1
            elif suffixes and not entry.name.endswith(suffixes):
                skipped["other_suffix"] += 1
            else:
                yield Path(entry.path)


def scan(files: Sequence[Path], *, min_bytes: int, skip_undecodable: bool, advance: Callable[[int], None]) -> Corpus:
    """Read every file once and list its distinct documents.

    Args:
        files: The files.
        min_bytes: Documents with fewer UTF-8 bytes are left out.
        skip_undecodable: Leave out documents that are not UTF-8 instead of failing.
        advance: Called with 1 after each file.

    Raises:
        UserError: A file cannot be read, is not UTF-8 or is not JSON lines with a "text", or no document is
            left.
    """
    documents: dict[bytes, Document] = {}
    skipped: Counter[str] = Counter()
    duplicates = total_bytes = 0
    file_digests: list[bytes] = []
    for path in files:
        file_hash = hashlib.sha256()
        for line, offset, raw in _records(path):
            file_hash.update(raw)
            total_bytes += len(raw)
            text, reason = _checked_text(
                raw, path=path, line=line, min_bytes=min_bytes, skip_undecodable=skip_undecodable
            )
            if reason:
                skipped[reason] += 1
                continue
            digest = hashlib.sha256(text).digest()
            if digest in documents:
                duplicates += 1
            else:
                documents[digest] = Document(path, line, offset, len(raw), len(text), digest)
        file_digests.append(file_hash.digest())
        advance(1)
    if not documents:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise UserError(
            f"the input holds no document: {len(files)} files, {total_bytes} bytes"
            + (f", left out: {left_out}" if left_out else ""),
            field="INPUT",
            fix="name files with text, or lower --min-bytes",
        )
    return Corpus(
        documents=tuple(documents.values()),
        duplicates=duplicates,
        skipped=skipped,
        files=len(files),
        bytes=total_bytes,
        sha256=hashlib.sha256(b"".join(sorted(file_digests))).hexdigest(),
    )


def read_document(document: Document) -> str:
    """Read the text of a document again.

    Raises:
        UserError: The file cannot be read, or no longer holds what it held when it was scanned.
    """
    try:
        with open(document.path, "rb") as file:
            file.seek(document.offset)
            raw = file.read(document.length)
    except OSError as error:
        raise _unreadable(document.path, error) from error
    changed = UserError(
        "the file changed while it was being prepared", field=document.place, fix="run the command again"
    )
    try:
        text = _text(raw, path=document.path, line=document.line)
    except (_Undecodable, UserError) as error:
        raise changed from error
    if hashlib.sha256(text).digest() != document.digest:
        raise changed
    return text.decode("utf-8")


def _records(path: Path) -> Iterator[tuple[int | None, int, bytes]]:
    """Yield (line number, offset, raw bytes) of each document; together the bytes are the whole file."""
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() != ".jsonl":
                yield None, 0, file.read()
                return
            offset = 0
            for number, raw in enumerate(file, start=1):
                yield number, offset, raw
                offset += len(raw)
    except OSError as error:
        raise _unreadable(path, error) from error


def _text(raw: bytes, *, path: Path, line: int | None) -> bytes:
    """Return the document's text as checked UTF-8."""
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Undecodable(f"byte 0x{raw[error.start]:02x} at offset {error.start}") from error
    if line is None or not decoded.strip():
        return raw if line is None else b""
    place = _place(path, line)
    fix = 'write one JSON object with a string under "text" on every line'
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON: {error}", field=place, fix=fix) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError('the line is not an object with a string under "text"', field=place, fix=fix)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Undecodable(f"a lone surrogate at character {error.start}") from error


def _checked_text(
    raw: bytes, *, path: Path, line: int | None, min_bytes: int, skip_undecodable: bool
) -> tuple[bytes, str | None]:
    """Return the document's text, and the reason to leave it out where there is one."""
    place = _place(path, line)
    try:
        text = _text(raw, path=path, line=line)
    except _Undecodable as error:
        if skip_undecodable:
            return b"", "not_utf8"
        raise UserError(
            f"the text is not UTF-8 ({error})",
            field=place,
            fix="convert it to UTF-8, or pass --skip-undecodable to leave such documents out",
        ) from error
    if len(text) > _MAX_DOCUMENT_BYTES:
        raise UserError(
            f"the document has {len(text)} bytes, more than the dataset format can hold",
            field=place,
            fix="split it into smaller documents",
        )
    if not text:
        return text, "empty"
    return text, "shorter_than_min_bytes" if len(text) < min_bytes else None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot be read: {error.strerror or error}",
        field=display(path),
        fix="mend its permissions, or leave it out of the input",
    )
