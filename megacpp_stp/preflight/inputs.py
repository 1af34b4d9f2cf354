"""Judging what a run reads, and that its arguments ask for real data and for checks of NaN."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from megacpp_stp.data.manifest import DatasetManifest, data_facts, load_manifest
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.health import NO_CHECKS
from megacpp_stp.preflight.place import nearest
from megacpp_stp.recipe.schema import Recipe
from megacpp_stp.runs.files import RECEIPT, read_json

_TOKENIZER = "HuggingFaceTokenizer"
_PREPARE_AGAIN = "prepare the data again, or bring its files back"
_TOKEN_BYTES = (2, 4)  # Megatron's indexed datasets have uint16 or int32 (DType.optimal_dtype)
# Options of megatron-core 0.19.2 that no plan has, and what they would do. None is on the list of
# `megacpp_stp.plan.passthrough`.
FORBIDDEN = {
    "--mock-data": "trains on numbers that nobody wrote",
    "--fake-process-group": "computes without the other ranks, and does not look for NaN",
    NO_CHECKS: "lets a run go on after a NaN",
    "--skip-train": "does not train",
    "--error-injection-rate": "makes wrong results on purpose",
}
_NEEDED = ("--tokenizer-type", "--train-data-path", "--valid-data-path")


def check_arguments(plan: RunPlan) -> str:
    """Hold the arguments against what makes a run something else than it says.

    Returns:
        What was found, in words.

    Raises:
        UserError: Mock data, a tokenizer that is none, or NaN checks switched off.
    """
    given = _options(plan.argv)
    skips = plan.recipe.training.health.nonfinite == "skip"
    for option in given:
        if option in FORBIDDEN and not (skips and option == NO_CHECKS):
            raise UserError(FORBIDDEN[option], field=option, fix="leave it out: no recipe can ask for it")
    for option in _NEEDED:
        if not given.get(option):
            raise UserError("is missing: Megatron would make data up", field=option, fix="plan the recipe again")
    tokenizer = given["--tokenizer-type"][0]
    if tokenizer != _TOKENIZER:
        raise UserError(
            "is not the tokenizer that the data was made with",
            field="--tokenizer-type",
            value=tokenizer,
            fix=f"use {_TOKENIZER}, as plans of recipes do",
        )
    return "real data, its own tokenizer, NaN checks " + ("ours, by training.health" if skips else "on")


def check_data(plan: RunPlan) -> str:
    """Hold the prepared data against its manifest and the recipe.

    Returns:
        What was found, in words.

    Raises:
        UserError: It is not there, cannot be read, is not what it was, or does not go with the recipe.
    """
    manifest = load_manifest(Path(plan.recipe.data.path), field="data.path")
    wanted, found = plan.recipe.model.vocab_size, manifest.tokenizer.vocab_size
    if wanted != found:
        raise UserError(
            f"the tokenizer in {plan.recipe.data.path} has {found} tokens",
            field="model.vocab_size",
            value=wanted,
            fix=f"--set model.vocab_size={found}, or prepare the data with --vocab-size {wanted}",
        )
    for name in ("train", "valid"):
        tokens = manifest.split(name).tokens
        if tokens <= plan.recipe.training.sequence_length:
            raise UserError(
                f"the {name} split has {tokens} tokens, less than one sequence",
                field="training.sequence_length",
                value=plan.recipe.training.sequence_length,
                fix="prepare more text, or shorten the sequence",
            )
    _check_readable(manifest)
    _check_content(manifest)
    _check_caches(plan)
    tokens = manifest.split("train").tokens
    return f"{plan.recipe.data.path}: {tokens:,} tokens to train on, {found:,} in the vocabulary, tokenizer as it was"


def check_same_data(plan: RunPlan, run_dir: Path) -> None:
    """Hold the data against what the run that goes on has read so far.

    Raises:
        UserError: Other content.
    """
    found = data_facts(load_manifest(Path(plan.recipe.data.path), field="data.path"))
    require_same_data(read_json(run_dir / RECEIPT).get("data"), found)


def require_same_data(known: object, found: object) -> None:
    """Refuse to go on with data of other content.

    Args:
        known: The receipt's `data_facts`; None where no rank came so far.
        found: Of the data that is there.

    Raises:
        UserError: They differ.
    """
    if known not in (None, found):
        raise UserError(
            "holds other data than this run was started with",
            field="data.path",
            fix="prepare the same data there again, or start a new run",
        )


def _check_readable(manifest: DatasetManifest) -> None:
    for name in manifest.files:
        try:
            with open(manifest.directory / name, "rb") as handle:
                handle.read(1)
        except OSError as error:
            raise UserError(
                f"{name} cannot be read: {error.strerror}", field="data.path", fix="mend its permissions"
            ) from None


def index_caches(recipe: Recipe) -> tuple[Path, ...]:
    """Where Megatron keeps the order in which it reads the data (``gpt_dataset.py`` of megatron-core 0.19.2)."""
    given = recipe.megatron.get("data-cache-path")
    if given is not None:
        return (Path(str(given)),)
    return tuple(Path(recipe.data.path) / split / "cache" for split in ("train", "valid"))


def _check_caches(plan: RunPlan) -> None:
    """Refuse a place in which none can be made; whether one that is there already serves, only Megatron knows."""
    for place in index_caches(plan.recipe):
        there = nearest(place)
        if not os.access(there, os.W_OK | os.X_OK) and not (os.path.isdir(place) and any(place.glob("**/*.npy"))):
            raise UserError(
                f"{there} is not writable: Megatron keeps the order of the samples in {place}",
                field="data.path",
                fix="mend its permissions, or name a place that all nodes share as megatron.data-cache-path",
            )


def _check_content(manifest: DatasetManifest) -> None:
    """What is cheap to check of it; the sha256 of the tokens would mean to read them all."""
    for split in ("train", "valid"):
        tokens, size = manifest.split(split).tokens, manifest.files[f"{split}.bin"]
        if size not in (tokens * width for width in _TOKEN_BYTES):
            raise UserError(f"{split}.bin does not hold {tokens} tokens", field="data.path", fix=_PREPARE_AGAIN)
    if manifest.tokenizer.eod_id >= manifest.tokenizer.vocab_size:
        raise UserError("the end of a document is no token", field="data.path", fix=_PREPARE_AGAIN)
    tokenizer = (manifest.tokenizer_dir / "tokenizer.json").read_bytes()
    if hashlib.sha256(tokenizer).hexdigest() != manifest.tokenizer.sha256:
        raise UserError(
            "the tokenizer is not the one that the tokens were made with", field="data.path", fix=_PREPARE_AGAIN
        )


def _options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Options with their values, in either spelling."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for token in argv:
        if token.startswith("--"):
            name, _, value = token.partition("=")
            values = found.setdefault(name, [])
            if value:
                values.append(value)
        else:
            values.append(token)
    return found
