"""`megacpp-stp data`: preparing training data."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from megacpp_stp.data.corpus import display
from megacpp_stp.data.manifest import DatasetManifest
from megacpp_stp.data.prepare import DEFAULT_VOCAB_SIZE, MAX_WORKERS_PER_CPU, PrepareOptions
from megacpp_stp.data.prepare import prepare as prepare_dataset
from megacpp_stp.data.progress import console_reporter
from megacpp_stp.data.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)

_Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT",
        help='Text files, .jsonl files (a document per line under "text") or directories of them.',
    ),
]
_VocabSize = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens of the tokenizer to train, {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}.",
        show_default=str(DEFAULT_VOCAB_SIZE),
    ),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        help=f"Threads, at most {MAX_WORKERS_PER_CPU} per CPU; they do not change the result.",
        show_default="the CPUs",
    ),
]


class _Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@app.callback()
def data() -> None:
    """Prepare training data."""


@app.command()
def prepare(
    inputs: _Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Dataset directory to make.")],
    vocab_size: _VocabSize = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a tokenizer to reuse instead of training one.")
    ] = None,
    suffix: Annotated[
        list[str] | None,
        typer.Option(help="In directories, take only files that end so, as .hpp; may be repeated."),
    ] = None,
    valid_fraction: Annotated[float, typer.Option(help="Share of the documents to validate with.")] = 0.05,
    min_bytes: Annotated[int, typer.Option(help="Leave out documents shorter than this.")] = 1,
    max_bytes: Annotated[
        int | None, typer.Option(help="Take a random part of the documents, of at most this size.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the documents' order.")] = 1234,
    skip_undecodable: Annotated[
        bool, typer.Option("--skip-undecodable", help="Leave out documents that are not UTF-8.")
    ] = False,
    workers: _Workers = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the prepared dataset at --output.")] = False,
) -> None:
    """Train a tokenizer on text and write Megatron training and validation datasets."""
    options = PrepareOptions(
        inputs=tuple(inputs),
        output=output,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        suffixes=tuple(suffix or ()),
        valid_fraction=valid_fraction,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        seed=seed,
        skip_undecodable=skip_undecodable,
        workers=workers,
        force=force,
    )
    errors = Console(stderr=True)
    try:
        with _stop_on_signals(), console_reporter(errors) as reporter:
            manifest = prepare_dataset(options, reporter)
    except _Stopped as stopped:
        name = signal.Signals(stopped.signal_number).name
        errors.print(f"stopped by {name}; the temporary files are removed", markup=False)
        raise typer.Exit(128 + stopped.signal_number) from None
    _print_summary(manifest, output)


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an exception; ignore further ones while it cleans up."""
    stops = (signal.SIGINT, signal.SIGTERM)

    def stop(signal_number: int, _frame: object) -> NoReturn:
        for each in stops:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal_number)

    before = {each: signal.signal(each, stop) for each in stops}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _print_summary(manifest: DatasetManifest, output: Path) -> None:
    table = Table("split", "documents", "tokens", "bytes", "bytes/token")
    for name, info in (("train", manifest.splits.train), ("valid", manifest.splits.valid)):
        table.add_row(name, str(info.documents), str(info.tokens), str(info.bytes), f"{info.bytes / info.tokens:.3f}")
    console = Console()
    console.print(table)
    left_out = {"duplicates": manifest.duplicates_dropped, **manifest.skipped}
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    lines = [f"vocabulary: {manifest.tokenizer.vocab_size} tokens", f"left out: {counts or 'nothing'}"]
    for line in (*lines, f"written: {display(output)}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
