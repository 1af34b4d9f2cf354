"""One corpus and one prepared dataset for all tests of `data prepare`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacpp_stp.data.manifest import DatasetManifest
from megacpp_stp.data.prepare import prepare
from tests.unit.data_prepare.corpora import ODD_TEXTS, options, words


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "source"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.h").write_text("hidden\n")
    for number in range(40):
        (root / "sub" / f"{number:02}.h").write_text(words(200, seed=number))
    for number, text in enumerate(ODD_TEXTS):
        (root / "sub" / "deep" / f"odd{number}.hpp").write_bytes(text.encode())
    (root / "copy_of_0.h").write_bytes((root / "sub" / "00.h").read_bytes())
    (root / "empty.h").write_bytes(b"")
    (root / "notes.txt").write_text("not wanted\n")
    (root / "link.h").symlink_to(root / "sub" / "01.h")
    return root


@pytest.fixture(scope="package")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    return prepare(options(source, tmp_path_factory.mktemp("out") / "set", workers=1))
