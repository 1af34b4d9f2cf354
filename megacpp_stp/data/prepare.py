"""The job behind `megacpp-stp data prepare`: text in, a tokenizer and Megatron datasets out."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from megacpp_stp import __version__
from megacpp_stp.data import corpus, directory, indexed, selection, tokenizer
from megacpp_stp.data.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    OptionsInfo,
    SourceInfo,
    SplitInfo,
    Splits,
    TokenizerInfo,
)
from megacpp_stp.data.progress import Reporter, SilentReporter
from megacpp_stp.errors import UserError

DEFAULT_VOCAB_SIZE = 4096
# Each thread may hold megabytes of tokens and must end its chunk before a signal can end the run, so threads far
# beyond the CPUs only cost memory and delay.
MAX_WORKERS_PER_CPU = 4
# Byte counts and the seed stand in the manifest, where readers in other languages take them for 64-bit integers.
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1
TOKENIZER_SAMPLE_BYTES = 20_000_000
_LOSSLESS_SAMPLE_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        inputs: Files and directories of text.
        output: The dataset directory to make.
        vocab_size: Number of token ids, from `tokenizer.MIN_VOCAB_SIZE` to `tokenizer.MAX_VOCAB_SIZE`; None for
            4096, or for what a reused tokenizer has.
        tokenizer: Directory of a tokenizer to reuse; None trains one.
        suffixes: In directories, take only file names with one of these endings; empty takes all.
        valid_fraction: Share of the documents to validate with, in (0, 1).
        min_bytes: Leave out documents with fewer UTF-8 bytes; at least 1, as `max_bytes`, and 64-bit.
        max_bytes: Stop taking documents, in the seeded order, before their UTF-8 bytes exceed this.
        seed: Draws the order of the documents; a signed 64-bit integer.
        skip_undecodable: Leave out documents that are not UTF-8 instead of failing.
        workers: Number of threads, at most `MAX_WORKERS_PER_CPU` per CPU at hand; None for one per CPU. Does not
            change the result.
        force: Replace a prepared dataset at `output`.
    """

    inputs: tuple[Path, ...]
    output: Path
    vocab_size: int | None = None
    tokenizer: Path | None = None
    suffixes: tuple[str, ...] = ()
    valid_fraction: float = 0.05
    min_bytes: int = 1
    max_bytes: int | None = None
    seed: int = 1234
    skip_undecodable: bool = False
    workers: int | None = None
    force: bool = False


@dataclass(frozen=True)
class _Documents:
    found: corpus.Corpus
    split: selection.Split
    skipped: Counter[str]


def prepare(options: PrepareOptions, reporter: Reporter | None = None) -> DatasetManifest:
    """Prepare a dataset.

    The files depend on the contents of the input and on the options only. The dataset directory appears
    when it is complete; see `directory.new_directory`.

    Args:
        options: What to prepare.
        reporter: Is told the progress; None for nothing.

    Returns:
        The manifest that was written.

    Raises:
        UserError: An option, the input, the output or the installation is at fault.
    """
    reporter = reporter or SilentReporter()
    output = directory.resolve_output(options.output)
    workers = _cpus() if options.workers is None else options.workers
    _check_options(options, output=output)
    directory.check_target(output, replace=options.force)
    found = corpus.find_files(options.inputs, suffixes=options.suffixes)
    with directory.new_directory(output, replace=options.force) as partial:
        with reporter.stage("loading libraries", total=1):
            indexed.require_libraries()
        documents = _choose(options, found, reporter)
        text_tokenizer = _make_tokenizer(options, documents.split.train, partial, workers, reporter)
        counts = {}
        for name, part in (("train", documents.split.train), ("valid", documents.split.valid)):
            total = sum(document.size for document in part)
            with reporter.stage(f"encoding {name}", total=total) as advance:
                counts[name] = indexed.write_split(
                    part, prefix=partial / name, tokenizer=text_tokenizer, workers=workers, advance=advance
                )
        manifest = _manifest(options, output, partial, documents, text_tokenizer, counts)
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _check_options(options: PrepareOptions, *, output: Path) -> None:
    _check_ranges(options)
    for suffix in options.suffixes:
        if not suffix.startswith(".") or len(suffix) < 2:
            raise UserError("a suffix begins with a dot", field="--suffix", value=suffix, fix="use one such as .hpp")
    for root in options.inputs:
        resolved = corpus.real_path(root)
        for inner, outer, problem in (
            (output, resolved, "the output lies inside an input"),
            (resolved, output, "an input lies inside the output"),
        ):
            if inner.is_relative_to(outer):
                raise UserError(
                    problem,
                    field="--output",
                    value=corpus.display(options.output),
                    fix="name an output directory outside of the inputs",
                )


def _check_ranges(options: PrepareOptions) -> None:
    if not 0 < options.valid_fraction < 1:
        raise UserError(
            "not a fraction between 0 and 1",
            field="--valid-fraction",
            value=options.valid_fraction,
            fix="use a value such as 0.05",
        )
    size, cpus = options.vocab_size, _cpus()
    if size is not None and size < tokenizer.MIN_VOCAB_SIZE:
        raise UserError(
            "the vocabulary is too small for the 256 bytes and the 2 special tokens",
            field="--vocab-size",
            value=size,
            fix=f"use {tokenizer.MIN_VOCAB_SIZE} or more",
        )
    for field, value, least, most, why in (
        ("--vocab-size", size, tokenizer.MIN_VOCAB_SIZE, tokenizer.MAX_VOCAB_SIZE, ""),
        ("--workers", options.workers, 1, MAX_WORKERS_PER_CPU * cpus, f", {MAX_WORKERS_PER_CPU} for each CPU at hand"),
        ("--min-bytes", options.min_bytes, 1, _MAX_INT64, ""),
        ("--max-bytes", options.max_bytes, 1, _MAX_INT64, ""),
        ("--seed", options.seed, _MIN_INT64, _MAX_INT64, ""),
    ):
        if value is not None and value > most:
            raise UserError("the number is too large", field=field, value=value, fix=f"use {most} or less{why}")
        if value is not None and value < least:
            problem = "not a positive number" if least == 1 else "the number is too small"
            raise UserError(problem, field=field, value=value, fix=f"use {least} or more")


def _choose(options: PrepareOptions, found: corpus.FoundFiles, reporter: Reporter) -> _Documents:
    with reporter.stage("reading", total=len(found.files)) as advance:
        scanned = corpus.scan(
            found.files,
            min_bytes=options.min_bytes,
            skip_undecodable=options.skip_undecodable,
            advance=advance,
        )
    shuffled = selection.shuffle(scanned.documents, seed=options.seed)
    taken = selection.take_bytes(shuffled, max_bytes=options.max_bytes)
    skipped = found.skipped + scanned.skipped
    if len(taken) < len(shuffled):
        skipped["beyond_max_bytes"] = len(shuffled) - len(taken)
    return _Documents(
        found=scanned,
        split=selection.split(taken, valid_fraction=options.valid_fraction),
        skipped=skipped,
    )


def _make_tokenizer(
    options: PrepareOptions,
    train: Sequence[corpus.Document],
    partial: Path,
    workers: int,
    reporter: Reporter,
) -> tokenizer.TextTokenizer:
    target = partial / "tokenizer"
    if options.tokenizer is not None:
        tokenizer.copy_tokenizer(options.tokenizer, directory=target)
        loaded = tokenizer.load_tokenizer(target)
        if options.vocab_size not in (None, loaded.vocab_size):
            raise UserError(
                f"the tokenizer to reuse has a vocabulary of {loaded.vocab_size} tokens",
                field="--vocab-size",
                value=options.vocab_size,
                fix="leave --vocab-size out, or leave --tokenizer out",
            )
        tokenizer.require_lossless(loaded, list(_sample(train, max_bytes=_LOSSLESS_SAMPLE_BYTES)))
        return loaded
    with reporter.stage("training the tokenizer", total=1), tokenizer.thread_limit(workers, nested=False):
        tokenizer.train_tokenizer(
            _sample(train, max_bytes=TOKENIZER_SAMPLE_BYTES),
            vocab_size=options.vocab_size or DEFAULT_VOCAB_SIZE,
            directory=target,
        )
    return tokenizer.load_tokenizer(target)


def _sample(documents: Sequence[corpus.Document], *, max_bytes: int) -> Iterator[str]:
    """Yield the texts of the first documents, the last one cut so that they have `max_bytes` at most."""
    left = max_bytes
    for document in documents:
        text = corpus.read_document(document)
        if document.size > left:
            yield text.encode("utf-8")[:left].decode("utf-8", "ignore")
            return
        yield text
        left -= document.size


def _manifest(
    options: PrepareOptions,
    output: Path,
    partial: Path,
    documents: _Documents,
    text_tokenizer: tokenizer.TextTokenizer,
    counts: dict[str, indexed.SplitCounts],
) -> DatasetManifest:
    def split_info(name: str) -> SplitInfo:
        return SplitInfo(
            documents=counts[name].documents,
            tokens=counts[name].tokens,
            bytes=counts[name].bytes,
            bin_sha256=_sha256(partial / f"{name}.bin"),
            idx_sha256=_sha256(partial / f"{name}.idx"),
        )

    files = sorted(path for path in partial.rglob("*") if path.is_file())
    return DatasetManifest(
        directory=output,
        tokenizer=TokenizerInfo(
            origin="trained" if options.tokenizer is None else "reused",
            vocab_size=text_tokenizer.vocab_size,
            eod_id=text_tokenizer.eod_id,
            sha256=_sha256(partial / "tokenizer" / "tokenizer.json"),
        ),
        splits=Splits(train=split_info("train"), valid=split_info("valid")),
        duplicates_dropped=documents.found.duplicates,
        skipped=dict(documents.skipped),
        source=SourceInfo(
            roots=tuple(corpus.display(Path(corpus.real_path(root).name)) for root in options.inputs),
            files=documents.found.files,
            bytes=documents.found.bytes,
            sha256=documents.found.sha256,
        ),
        options=OptionsInfo(
            suffixes=options.suffixes,
            valid_fraction=options.valid_fraction,
            min_bytes=options.min_bytes,
            max_bytes=options.max_bytes,
            seed=options.seed,
            skip_undecodable=options.skip_undecodable,
            tokenizer_sample_bytes=TOKENIZER_SAMPLE_BYTES,
        ),
        versions={
            "megacpp-stp": __version__,
            "megatron-core": version("megatron-core"),
            "python": platform.python_version(),
            "tokenizers": version("tokenizers"),
            "torch": version("torch"),
        },
        files={path.relative_to(partial).as_posix(): path.stat().st_size for path in files},
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
