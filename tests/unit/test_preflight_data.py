"""Prepared data against its manifest and the recipe, on a dataset of a few bytes."""

import hashlib
import json
from dataclasses import replace

import pytest

from megacpp_stp.data.manifest import data_facts, load_manifest
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Verdict
from megacpp_stp.preflight.inputs import check_data
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.files import write_json
from megacpp_stp.training.preflight import checks
from tests.unit.machines import CPU_MACHINE

TOKENIZER = b'{"model": {}}'
SHA256 = hashlib.sha256(TOKENIZER).hexdigest()
TOKENS = 300


@pytest.fixture
def dataset(tmp_path):
    """Writes the smallest directory that is a prepared dataset, with what a test changes of its manifest."""

    def write(*, tokens=TOKENS, bin_bytes=2 * TOKENS, vocab=512, eod=511, sha=SHA256):
        contents = {
            "tokenizer/tokenizer.json": TOKENIZER,
            "train.bin": bytes(bin_bytes),
            "train.idx": b"idx",
            "valid.bin": bytes(2 * TOKENS),
            "valid.idx": b"idx",
        }
        for name, content in contents.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        split = {"documents": 1, "bytes": 900, "bin_sha256": "a", "idx_sha256": "b"}
        manifest = {
            "format_version": 1,
            "tokenizer": {"origin": "trained", "vocab_size": vocab, "eod_id": eod, "sha256": sha},
            "splits": {"train": {**split, "tokens": tokens}, "valid": {**split, "tokens": TOKENS}},
            "duplicates_dropped": 0,
            "skipped": {},
            "source": {"roots": ["x"], "files": 1, "bytes": 900, "sha256": "c"},
            "options": {
                "suffixes": [".txt"],
                "valid_fraction": 0.5,
                "min_bytes": 1,
                "max_bytes": None,
                "seed": 1,
                "skip_undecodable": False,
                "tokenizer_sample_bytes": 9,
            },
            "versions": {},
            "files": {name: len(content) for name, content in contents.items()},
        }
        (tmp_path / "dataset.json").write_text(json.dumps(manifest))
        return tmp_path

    return write


def plan_on(path, *overrides):
    settings = ("model.vocab_size=512", "training.sequence_length=64", f"data.path={path}", *overrides)
    return build_plan(load_recipe("nam56r-tiny", settings), device="cpu")


def test_data_as_prepared_is_fine(dataset):
    assert "300 tokens to train on, 512 in the vocabulary" in check_data(plan_on(dataset()))
    assert check_data(plan_on(dataset(bin_bytes=4 * TOKENS)))  # four bytes a token


@pytest.mark.parametrize(
    ("changes", "overrides", "field", "says"),
    [
        ({"vocab": 500}, (), "model.vocab_size", "500 tokens"),
        ({}, ("training.sequence_length=300",), "training.sequence_length", "300 tokens, less than one sequence"),
        ({"tokens": 299}, (), "data.path", "train.bin does not hold 299 tokens"),
        ({"eod": 512}, (), "data.path", "no token"),
        ({"sha": "0" * 64}, (), "data.path", "not the one that the tokens were made with"),
    ],
)
def test_data_that_is_not_what_the_run_says_is_refused(dataset, changes, overrides, field, says):
    with pytest.raises(UserError, match=says) as caught:
        check_data(plan_on(dataset(**changes), *overrides))
    assert caught.value.field == field


def test_data_that_is_gone_short_or_unreadable_is_refused(dataset, monkeypatch):
    path = dataset()
    plan = plan_on(path)
    with pytest.raises(UserError, match="does not exist"):
        check_data(plan_on(path / "nowhere"))
    real = open

    def unreadable(name, *arguments, **options):
        if str(name).endswith("train.idx"):  # root may read anything, so the system's answer is made up
            raise PermissionError(13, "Permission denied")
        return real(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", unreadable)
    with pytest.raises(UserError, match=r"train.idx cannot be read: Permission denied"):
        check_data(plan)
    monkeypatch.undo()
    (path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train.bin"):
        check_data(plan)
    (path / "train.bin").unlink()
    with pytest.raises(UserError, match="lacks its file"):
        check_data(replace(plan))


def test_other_data_than_the_runs_is_refused_before_its_directory_changes(dataset, tmp_path):
    """Here, and not by a rank, when the run's plan is the new one already and its receipt says incomplete."""
    plan, run_dir = plan_on(dataset()), tmp_path / "run"
    run_dir.mkdir()

    def judged(**more):
        case = Case(machine=CPU_MACHINE, plan=plan, run_dir=run_dir, **more)
        found = [finding for check in list(checks(case))[:-1] for finding in check(case)]  # the last takes seconds
        return next(finding for finding in found if finding.name == "data")

    for known in (None, data_facts(load_manifest(tmp_path))):
        write_json(run_dir / "receipt.json", {"data": known})
        assert judged(from_iteration=4).verdict is Verdict.FINE
    write_json(run_dir / "receipt.json", {"data": {"source_sha256": "another"}})
    assert judged(from_iteration=4).found == "holds other data than this run was started with"
    assert judged().verdict is Verdict.FINE


def test_a_place_that_cannot_hold_the_index_cache_is_refused_unless_there_is_one(dataset, tmp_path, monkeypatch):
    path = dataset()
    monkeypatch.setattr(
        "os.access", lambda place, mode: not str(place).startswith(str(path))
    )  # root may write anywhere
    with pytest.raises(UserError, match="is not writable: Megatron keeps the order of the samples in") as caught:
        check_data(plan_on(path))
    assert "megatron.data-cache-path" in caught.value.fix
    elsewhere = tmp_path.parent / "elsewhere"
    assert check_data(plan_on(path, f"megatron.data-cache-path={elsewhere}"))
    for split in ("train", "valid"):
        (path / split / "cache" / "x").mkdir(parents=True)
        (path / split / "cache" / "x" / "y.npy").touch()
    assert check_data(plan_on(path))
