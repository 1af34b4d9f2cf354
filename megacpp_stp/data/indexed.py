"""Writing documents as a Megatron indexed dataset: tokens in `.bin`, lengths and documents in `.idx`."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.data.corpus import Document, read_document
from megacpp_stp.data.tokenizer import TextTokenizer, thread_limit
from megacpp_stp.errors import UserError

# Enough work per call to hide its cost; an encoding takes some hundred bytes of memory per token.
_CHUNK_BYTES = 1_000_000


@dataclass(frozen=True)
class SplitCounts:
    """What was written: documents, tokens with the end-of-document tokens, UTF-8 bytes of the text."""

    documents: int
    tokens: int
    bytes: int


def require_libraries() -> None:
    """Import the libraries that preparing needs, and that the rest of the package does without.

    Raises:
        UserError: One is not installed.
    """
    try:
        with _quiet():
            import tokenizers  # noqa: F401
            import torch  # noqa: F401
            from megatron.core.datasets import indexed_dataset  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"preparing data needs torch, megatron-core and tokenizers: {error}",
            fix="pip install 'megacpp-stp[train]'",
        ) from error


def write_split(
    documents: Sequence[Document],
    *,
    prefix: Path,
    tokenizer: TextTokenizer,
    workers: int,
    advance: Callable[[int], None],
) -> SplitCounts:
    """Write `prefix`.bin and `prefix`.idx: a sequence per document, ended by the end-of-document token.

    Args:
        documents: The documents, in the order to write.
        prefix: Path without the suffix.
        tokenizer: The tokenizer.
        workers: Number of encoding threads; does not change what is written.
        advance: Called with the UTF-8 bytes done, chunk by chunk.

    Raises:
        UserError: A document cannot be read again, or has changed.
    """
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDatasetBuilder,
        get_bin_path,
        get_idx_path,
    )

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    tokens = 0
    try:
        chunks = _encoded(documents, tokenizer=tokenizer, workers=workers)
        with thread_limit(workers, nested=True), closing(chunks):
            for chunk, encoded in chunks:
                for ids in encoded:
                    ids.append(tokenizer.eod_id)
                    builder.add_document(torch.from_numpy(numpy.array(ids, dtype=numpy.int32)), [len(ids)])
                    tokens += len(ids)
                advance(sum(document.size for document in chunk))
        builder.finalize(get_idx_path(str(prefix)))
    finally:
        builder.data_file.close()
    return SplitCounts(len(documents), tokens, sum(document.size for document in documents))


def _encoded(
    documents: Sequence[Document], *, tokenizer: TextTokenizer, workers: int
) -> Generator[tuple[list[Document], list[list[int]]], None, None]:
    """Yield chunks and their tokens in order, encoded ahead by `workers` threads."""

    def encode(chunk: list[Document]) -> list[list[int]]:
        return tokenizer.encode([read_document(document) for document in chunk])

    pending: deque[tuple[list[Document], Future[list[list[int]]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for chunk in _chunks(documents):
            pending.append((chunk, pool.submit(encode, chunk)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what megatron-core says on import about GPU kernels that are not installed."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
