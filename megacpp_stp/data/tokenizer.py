"""The byte-level BPE tokenizer: training, saving in Hugging Face format, loading, encoding.

Every text round-trips: the alphabet holds all 256 bytes, nothing is normalised and no token stands for
"unknown". The text of a special token inside a document is encoded as ordinary bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpp_stp.data.corpus import display
from megacpp_stp.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # the bytes and the special tokens
# The trainer reserves memory for the whole vocabulary at once and aborts the process where there is too little.
MAX_VOCAB_SIZE = 2**20

_CONFIG = {
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "eos_token": END_OF_TEXT,
    "pad_token": PAD,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_SPECIAL_TOKENS = {"eos_token": END_OF_TEXT, "pad_token": PAD}
# A pair seen once is no regularity; learning it would only store a piece of the sample.
_MIN_PAIR_COUNT = 2
_HF_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokenizer.

    Attributes:
        backend: The `tokenizers.Tokenizer`.
        vocab_size: Number of token ids, special tokens included.
        eod_id: Id of the end-of-document token.
    """

    backend: Tokenizer
    vocab_size: int
    eod_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with no special token among them.

        Raises:
            UserError: The tokenizer cannot encode a text.
        """
        with _library_errors("it cannot encode the documents"):
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens spelt out.

        Raises:
            UserError: The tokenizer cannot decode them.
        """
        with _library_errors("it cannot decode its tokens"):
            return str(self.backend.decode(list(ids), skip_special_tokens=False))


@contextmanager
def thread_limit(workers: int, *, nested: bool) -> Iterator[None]:
    """Bound the threads the tokenizers library uses.

    Its pool is sized once per process, by the first use; `nested` keeps each call in the calling thread,
    for callers that bring threads of their own.

    Args:
        workers: Number of threads.
        nested: Whether calls come from several threads.
    """
    wanted = {
        "RAYON_NUM_THREADS": str(workers),
        "TOKENIZERS_PARALLELISM": "false" if nested or workers == 1 else "true",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, directory: Path) -> None:
    """Train a tokenizer and save it in Hugging Face format.

    Args:
        texts: The training sample. The same texts give the same files, whatever the number of threads.
        vocab_size: Number of token ids, the 256 bytes and the 2 special tokens included.
        directory: Where to save; made when missing.

    Raises:
        UserError: The sample has too few repeated pairs for the vocabulary, or the library fails on it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise UserError(
            f"the tokenizers library failed to train: {error}",
            field="--vocab-size",
            value=vocab_size,
            fix="pass a smaller --vocab-size, or --tokenizer to reuse one",
        ) from error
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise UserError(
            f"the training documents only yield a vocabulary of {reached} tokens",
            field="--vocab-size",
            value=vocab_size,
            fix=f"pass --vocab-size {reached} or less, or add text",
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", _CONFIG)
    _write_json(directory / "special_tokens_map.json", _SPECIAL_TOKENS)


def copy_tokenizer(source: Path, *, directory: Path) -> None:
    """Copy the files of a Hugging Face tokenizer.

    Raises:
        UserError: `source` holds no `tokenizer.json`, or a file of it cannot be read.
    """
    if not os.path.isfile(source / "tokenizer.json"):
        nested = source / "tokenizer"
        inside = os.path.isfile(nested / "tokenizer.json")
        raise UserError(
            "the directory holds no tokenizer.json",
            field="--tokenizer",
            value=display(source),
            fix=f"pass --tokenizer {display(nested)}" if inside else "name the tokenizer/ of a prepared dataset",
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name in _HF_FILES:
        if not os.path.isfile(source / name):
            continue
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror}",
                field=display(source / name),
                fix="mend its permissions",
            ) from error
        (directory / name).write_bytes(content)


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Load a saved tokenizer for encoding.

    Args:
        directory: A directory with `tokenizer.json` and, naming the end-of-document token as `eos_token`,
            `tokenizer_config.json`.

    Raises:
        UserError: The files are damaged, name no end-of-document token, or number their tokens with gaps.
    """
    from tokenizers import Tokenizer

    with _library_errors("tokenizer.json cannot be loaded"):
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # Reused tokenizers may cut or pad to a model's length; documents are stored whole.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    eos = _eos_token(directory / "tokenizer_config.json")
    eod_id = None if eos is None else backend.token_to_id(eos)
    if eod_id is None:
        raise _unusable("it names no eos_token of its vocabulary in tokenizer_config.json")
    ids = backend.get_vocab(with_added_tokens=True).values()
    if max(ids) + 1 != len(ids):
        raise _unusable("its token ids are not numbered from 0 without gaps")
    return TextTokenizer(backend=backend, vocab_size=len(ids), eod_id=eod_id)


def require_lossless(tokenizer: TextTokenizer, texts: Sequence[str]) -> None:
    """Check that texts survive encoding and decoding.

    Raises:
        UserError: A text does not.
    """
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if tokenizer.decode(ids) != text:
            raise _unusable("it loses text: decoding its tokens does not give the documents back")


def _eos_token(config: Path) -> str | None:
    try:
        raw: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    eos = raw.get("eos_token") if isinstance(raw, dict) else None
    if isinstance(eos, dict):
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Turn what the tokenizers library raises on a tokenizer into a `UserError`."""
    try:
        yield
    except BaseException as error:
        # It raises bare Exception, and for a panic in its Rust code a BaseException. A signal passes through.
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise _unusable(f"{problem}: {error}") from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked; the class has a name but no module to import it from."""
    return type(error).__name__ == "PanicException"


def _unusable(problem: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be reused: {problem}",
        field="--tokenizer",
        fix="name the tokenizer/ of a prepared dataset, or leave the option out to train one",
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
