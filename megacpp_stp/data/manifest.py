"""The manifest of a prepared dataset (`dataset.json`): its schema, and the check of the files it lists.

Needs neither torch nor megatron-core, so that a launcher can check its data anywhere.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megacpp_stp.errors import UserError

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "dataset.json"
REQUIRED_FILES = ("tokenizer/tokenizer.json", "train.bin", "train.idx", "valid.bin", "valid.idx")

SplitName = Literal["train", "valid"]

_PREPARE = "megacpp-stp data prepare INPUT... --output DIR"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(_Record):
    """The tokenizer the tokens were made with.

    Attributes:
        origin: "trained" on this corpus, or "reused" from an earlier one.
        vocab_size: Number of token ids, special tokens included.
        eod_id: Id of the end-of-document token, which ends every document.
        sha256: SHA-256 of `tokenizer/tokenizer.json`, in hex.
    """

    origin: Literal["trained", "reused"]
    vocab_size: int = Field(gt=0)
    eod_id: int = Field(ge=0)
    sha256: str


class SplitInfo(_Record):
    """One split.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, one end-of-document token per document included.
        bytes: UTF-8 bytes of the text of its documents.
        bin_sha256: SHA-256 of the `.bin` file, in hex.
        idx_sha256: SHA-256 of the `.idx` file, in hex.
    """

    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)
    bin_sha256: str
    idx_sha256: str


class Splits(_Record):
    """The two splits."""

    train: SplitInfo
    valid: SplitInfo


class SourceInfo(_Record):
    """Where the text came from.

    Attributes:
        roots: Last path component of each input, as given.
        files: Number of files read.
        bytes: Their size.
        sha256: SHA-256 over the sorted SHA-256 digests of the files: the same for the same contents under
            other names.
    """

    roots: tuple[str, ...]
    files: int
    bytes: int
    sha256: str


class OptionsInfo(_Record):
    """The options that shaped the result; see `prepare.PrepareOptions`."""

    suffixes: tuple[str, ...]
    valid_fraction: float
    min_bytes: int
    max_bytes: int | None
    seed: int
    skip_undecodable: bool
    tokenizer_sample_bytes: int


class DatasetManifest(_Record):
    """A prepared dataset.

    Attributes:
        directory: Where it lies; known from loading it and not part of the file.
        format_version: Version of this schema.
        tokenizer: The tokenizer.
        splits: Counts and checksums per split.
        duplicates_dropped: Documents left out since an earlier one has the same bytes.
        skipped: Number of files, directory entries and documents left out, by reason.
        source: Where the text came from.
        options: The options that shaped the result.
        versions: Versions of the libraries that wrote it.
        files: Size in bytes of every file, by its path below the directory.
    """

    directory: Path = Field(exclude=True)
    format_version: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerInfo
    splits: Splits
    duplicates_dropped: int
    skipped: dict[str, int]
    source: SourceInfo
    options: OptionsInfo
    versions: dict[str, str]
    files: dict[str, int]

    @property
    def tokenizer_dir(self) -> Path:
        """Directory of the Hugging Face tokenizer."""
        return self.directory / "tokenizer"

    @property
    def train_prefix(self) -> Path:
        """Megatron's path prefix of the training split: the path without `.bin` and `.idx`."""
        return self.directory / "train"

    @property
    def valid_prefix(self) -> Path:
        """Megatron's path prefix of the validation split."""
        return self.directory / "valid"

    def split(self, name: SplitName) -> SplitInfo:
        """Return one split by name."""
        return self.splits.train if name == "train" else self.splits.valid

    def bytes_per_token(self, split: SplitName) -> float:
        """Return the UTF-8 bytes of text per token of a split, end-of-document tokens counted as tokens."""
        info = self.split(split)
        return info.bytes / info.tokens

    def bits_per_byte(self, split: SplitName, *, loss_nats: float) -> float:
        """Convert a mean loss in nats per token of a split into bits per UTF-8 byte of text."""
        return loss_nats / math.log(2) / self.bytes_per_token(split)

    def to_json(self) -> str:
        """Return the text of `dataset.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def data_facts(manifest: DatasetManifest) -> dict[str, Any]:
    """What a run reads, by content: equal wherever it lies."""
    splits = {
        name: {"tokens": info.tokens, "documents": info.documents, "bin_sha256": info.bin_sha256}
        for name, info in (("train", manifest.split("train")), ("valid", manifest.split("valid")))
    }
    tokenizer = {"vocab_size": manifest.tokenizer.vocab_size, "sha256": manifest.tokenizer.sha256}
    return {"splits": splits, "tokenizer": tokenizer, "source_sha256": manifest.source.sha256}


def load_manifest(directory: Path | str, *, field: str | None = None) -> DatasetManifest:
    """Read and check the manifest of a prepared dataset.

    Checks that every file it lists is there with the size it lists; does not read the files.

    Args:
        directory: The dataset directory.
        field: What to name in errors, such as the recipe path or option that held the directory. By default
            the path at fault.

    Raises:
        UserError: There is no such directory, it is not a prepared dataset, its format version is not
            known, or a file is missing or has another size.
    """
    directory = Path(directory)
    raw = read_raw_manifest(directory, field=field)
    path = directory / MANIFEST_NAME
    try:
        manifest = DatasetManifest.model_validate({**raw, "directory": directory})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the dataset manifest {path} is damaged at {where}: {first['msg'].lower()}",
            field=field or str(path),
            fix=f"prepare the dataset again: {_PREPARE} --force",
        ) from error
    _check_files(manifest, field=field)
    return manifest


def read_raw_manifest(directory: Path, *, field: str | None = None) -> dict[str, Any]:
    """Read `dataset.json` of a known format version, without checking the rest.

    Args:
        directory: The dataset directory.
        field: As for `load_manifest`.

    Raises:
        UserError: There is no such directory, or no manifest of a known version in it.
    """
    where = field or str(directory)
    if not os.path.isdir(directory):
        problem = "not a directory" if os.path.lexists(directory) else "the dataset directory does not exist"
        raise UserError(problem, field=where, value=str(directory), fix=f"prepare it: {_PREPARE}")
    path = directory / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"not a prepared dataset: it has no {MANIFEST_NAME}",
            field=where,
            value=str(directory),
            fix=f"name a directory written by: {_PREPARE}",
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be read: {reason}", field=where, fix="mend its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON",
            field=where,
            fix=f"prepare the dataset again, into another directory: {_PREPARE}",
        ) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has a format_version other than {FORMAT_VERSION}",
            field=where,
            value=version,
            fix=f"prepare the dataset again with this version of megacpp-stp: {_PREPARE}",
        )
    return dict(raw)


def _check_files(manifest: DatasetManifest, *, field: str | None) -> None:
    fix = f"prepare the dataset again: {_PREPARE} --force"
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            path = manifest.directory / MANIFEST_NAME
            raise UserError(f"the dataset manifest {path} does not list {name}", field=field or str(path), fix=fix)
    for name, size in manifest.files.items():
        path = manifest.directory / name
        if not os.path.isfile(path):
            raise UserError(f"the dataset lacks its file {name}", field=field or str(path), fix=fix)
        found = path.stat().st_size
        if found != size:
            raise UserError(
                f"the file {name} of the dataset does not have the {size} bytes it was written with",
                field=field or str(path),
                value=found,
                fix=fix,
            )
