"""What `megacpp-stp data prepare` writes, with the real tokenizers and megatron-core libraries."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megacpp_stp.data import corpus, indexed, selection, tokenizer
from megacpp_stp.data.manifest import DatasetManifest
from megacpp_stp.data.prepare import prepare
from tests.unit.data_prepare.corpora import ODD_TEXTS, VOCAB, contents, error_of, options, read_split

# megatron-core converts torch tensors in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_the_tokens_decode_to_the_documents(source: Path, prepared: DatasetManifest) -> None:
    loaded = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    expected = {path.read_bytes().decode() for path in (source / "sub").rglob("*.h*")}
    splits: dict[str, list[str]] = {}
    for name, prefix in (("train", prepared.train_prefix), ("valid", prepared.valid_prefix)):
        documents = read_split(prefix)
        for ids in documents:
            assert ids[-1] == loaded.eod_id
            assert loaded.eod_id not in ids[:-1]
        splits[name] = [loaded.decode(ids[:-1]) for ids in documents]
        info = getattr(prepared.splits, name)
        assert info.documents == len(documents)
        assert info.tokens == sum(map(len, documents))
        assert info.bytes == sum(len(text.encode()) for text in splits[name])
    assert len(splits["valid"]) == round(0.2 * len(expected))
    assert not set(splits["train"]) & set(splits["valid"])
    assert len(splits["train"]) + len(splits["valid"]) == len(expected)
    assert set(splits["train"]) | set(splits["valid"]) == expected


def test_the_manifest_counts_what_was_left_out(source: Path, prepared: DatasetManifest) -> None:
    assert prepared.duplicates_dropped == 1
    assert prepared.skipped == {"hidden": 1, "symlink": 1, "other_suffix": 1, "empty": 1}
    assert prepared.source.roots == ("source",)
    assert prepared.source.files == 40 + len(ODD_TEXTS) + 2
    text = (prepared.directory / "dataset.json").read_text()
    assert str(source.parent) not in text and str(prepared.directory.parent) not in text


def test_megatron_and_transformers_load_the_tokenizer(prepared: DatasetManifest) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from transformers import AutoTokenizer

    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(prepared.tokenizer_dir),
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        trust_remote_code=False,
        tokenizer_hf_no_include_special_tokens=False,
        metadata_path=None,
        pad_vocab_size=False,
    )
    megatron = build_tokenizer(args)
    hugging_face = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    ours = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    assert megatron.vocab_size == len(hugging_face) == ours.vocab_size == VOCAB
    assert megatron.eod == hugging_face.eos_token_id == ours.eod_id == prepared.tokenizer.eod_id
    assert hugging_face.pad_token_id == ours.backend.token_to_id(tokenizer.PAD)
    for text in ODD_TEXTS:
        if "<|" in text:
            continue
        ids = ours.encode([text])[0]
        assert megatron.tokenize(text) == hugging_face(text).input_ids == ids
        assert megatron.detokenize(ids) == hugging_face.decode(ids) == text


def test_every_byte_and_the_text_of_a_special_token_round_trip(prepared: DatasetManifest) -> None:
    ours = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    everything = "".join(map(chr, [*range(0x900), *range(0xFFF0, 0x10000), 0x1F9EA, 0x10FFFF]))
    for text in (everything, tokenizer.END_OF_TEXT, f" {tokenizer.PAD}{tokenizer.END_OF_TEXT}x"):
        ids = ours.encode([text])[0]
        assert not {ours.eod_id, ours.backend.token_to_id(tokenizer.PAD)} & set(ids)
        assert ours.decode(ids) == text


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (70_000, "int32")])
def test_the_token_type_follows_the_vocabulary(
    prepared: DatasetManifest, source: Path, tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    loaded = tokenizer.load_tokenizer(prepared.tokenizer_dir)
    path = source / "sub" / "00.h"
    found = corpus.scan([path], min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    wide = tokenizer.TextTokenizer(loaded.backend, vocab_size=vocab_size, eod_id=loaded.eod_id)
    indexed.write_split(found.documents, prefix=tmp_path / "x", tokenizer=wide, workers=1, advance=lambda done: None)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert dataset.index.dtype.__name__ == dtype
    assert loaded.decode(dataset[0].tolist()[:-1]) == path.read_text()


# What it depends on


def test_the_result_depends_on_contents_and_options_only(
    source: Path, prepared: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "source"
    shutil.copytree(source, moved, symlinks=True)
    (moved / "sub" / "07.h").rename(moved / "aaa.h")
    monkeypatch.setattr(indexed, "_CHUNK_BYTES", 2_000)
    again = prepare(options(moved, tmp_path / "again", workers=3))
    assert contents(again.directory) == contents(prepared.directory)
    other = prepare(options(moved, tmp_path / "other", seed=7, tokenizer=prepared.tokenizer_dir))
    assert other.splits.train.bin_sha256 != prepared.splits.train.bin_sha256


def test_max_bytes_takes_a_prefix_of_the_order(source: Path) -> None:
    files = corpus.find_files([source], suffixes=[".h"]).files
    found = corpus.scan(files, min_bytes=1, skip_undecodable=False, advance=lambda done: None)
    order = selection.shuffle(found.documents, seed=1)
    assert order == selection.shuffle(found.documents[::-1], seed=1)
    assert order != selection.shuffle(found.documents, seed=2)
    limit = sum(document.size for document in order[:10])
    assert selection.take_bytes(order, max_bytes=limit) == order[:10]
    assert selection.take_bytes(order, max_bytes=limit - 1) == order[:9]
    assert selection.take_bytes(order, max_bytes=None) == order


def test_jsonl_holds_a_document_per_line(prepared: DatasetManifest, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ODD_TEXTS]
    raw = "\n".join([*lines, "", json.dumps({"text": ""}), json.dumps({"text": "tiny"}), lines[0]])
    (tmp_path / "in.jsonl").write_text(raw)
    manifest = prepare(
        options(
            tmp_path / "in.jsonl",
            tmp_path / "set",
            vocab_size=None,
            valid_fraction=0.5,
            min_bytes=5,
            tokenizer=prepared.tokenizer_dir,
        )
    )
    loaded = tokenizer.load_tokenizer(manifest.tokenizer_dir)
    texts = [
        loaded.decode(ids[:-1])
        for prefix in (manifest.train_prefix, manifest.valid_prefix)
        for ids in read_split(prefix)
    ]
    assert sorted(texts) == sorted(ODD_TEXTS)
    assert manifest.duplicates_dropped == 1
    assert manifest.skipped == {"empty": 2, "shorter_than_min_bytes": 1}
    assert manifest.tokenizer.origin == "reused"
    assert manifest.tokenizer.sha256 == prepared.tokenizer.sha256


def test_undecodable_documents_are_left_out_on_request(prepared: DatasetManifest, source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latin1.h").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "lone.jsonl").write_text('{"text": "\\ud800"}')
    bad = (source, tmp_path / "in")
    changes: dict[str, Any] = {"inputs": bad, "suffixes": (), "tokenizer": prepared.tokenizer_dir}
    error = error_of(lambda: prepare(options(source, tmp_path / "set", **changes)))
    assert "UTF-8" in error.problem and str(error.field).endswith("latin1.h")
    assert "--skip-undecodable" in str(error.fix)
    manifest = prepare(options(source, tmp_path / "set", **changes, skip_undecodable=True))
    assert manifest.skipped["not_utf8"] == 2


def test_the_tokenizer_learns_from_training_documents_only(tmp_path: Path) -> None:
    found = tmp_path / "in"
    found.mkdir()
    for number in range(20):
        (found / f"{number}.txt").write_text(f"{chr(0x4E00 + number) * 4} " * 50)
    made = prepare(options(found, tmp_path / "set", suffixes=(), vocab_size=260, valid_fraction=0.05))
    valid = tokenizer.load_tokenizer(made.tokenizer_dir)
    (held_out,) = read_split(made.valid_prefix)
    char = valid.decode(held_out[:-1])[0]
    merged = json.loads((made.tokenizer_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merged) == 2
    assert len(valid.encode([char])[0]) > 1
