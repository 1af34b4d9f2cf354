"""A small prepared dataset, and the command line as users call it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

VOCAB = 512
# Six iterations with the gate in the middle: all that a run does, in seconds.
SHORT = (
    "training.iterations=6",
    "training.log_interval=1",
    "training.eval_interval=3",
    "training.eval_iterations=1",
    "training.sequence_length=64",
    "optimizer.warmup_iterations=1",
    "stp.start_step=3",
    "training.fused_cross_entropy=null",
    "model.families.A.sparse.kernel=upstream",
    f"model.vocab_size={VOCAB}",
)

Cli = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """Without what a run refuses to find set to something else."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES",)}
    return {**clean, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megacpp_stp", *arguments]


@pytest.fixture(scope="session")
def cli() -> Cli:
    def call(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment())

    return call


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """A slice of the C++ headers that torch ships."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    headers = Path(spec.origin).parent / "include" / "c10" / "util"
    output = tmp_path_factory.mktemp("data") / "headers"
    done = cli("data", "prepare", str(headers), "--output", str(output), "--vocab-size", str(VOCAB))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def short_run(dataset: Path) -> tuple[str, ...]:
    """Arguments of a short run on the CPU, without the run directory."""
    settings = (*SHORT, f"data.path={dataset}")
    overrides = (token for setting in settings for token in ("--set", setting))
    return ("launch", "nam56r-tiny", "--device", "cpu", *overrides)


@pytest.fixture(scope="session")
def run(
    cli: Cli, short_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run: its directory, and what the launch printed."""
    directory = tmp_path_factory.mktemp("runs") / "short"
    done = cli(*short_run, "--run-dir", str(directory))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory, done
