"""Small corpora and readers that the tests of `data prepare` share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacpp_stp.data.prepare import PrepareOptions
from megacpp_stp.errors import UserError

VOCAB = 300
ODD_TEXTS = (
    "ends with no newline",
    "\ufeffbyte order mark\r\nand CRLF\r\n",
    "NUL \x00 and DEL \x7f and  trailing spaces   \n\n\n",
    "emoji 🧪, кириллица, 漢字, combining e\u0301\n",
    "literal <|endoftext|> and <|pad|> inside\n",
    "\t\tint main() { return don't + we'll; }\n",
)


def words(count: int, *, seed: int) -> str:
    rng = random.Random(seed)
    stock = ["template", "class", "int", "float", "return", "const", "void", "{", "}", ";", "\n    ", "x"]
    return " ".join(rng.choices(stock, k=count)) + f" // {seed}\n"


def options(source: Path, output: Path, **changes: Any) -> PrepareOptions:
    values: dict[str, Any] = {
        "inputs": (source,),
        "output": output,
        "vocab_size": VOCAB,
        "suffixes": (".h", ".hpp"),
        "valid_fraction": 0.2,
    }
    return PrepareOptions(**{**values, **changes})


def read_split(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def error_of(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.fix
    return caught.value
