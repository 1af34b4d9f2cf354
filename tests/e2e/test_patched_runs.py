"""Launches whose patch surfaces are not as reviewed: refused before they start, or allowed, and then in the receipt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import environment

ROOT = Path(__file__).parents[2]
BF16 = (
    "training.precision=bf16",
    "training.checkpoint=null",
    "training.iterations=2",
    "stp.start_step=1",
    "training.eval_interval=2",
)
SETUP = "megatron.training.training:setup_model_and_optimizer"
COMPILE = "megatron.training.initialize:_compile_dependencies"


@pytest.fixture
def unreviewed(tmp_path: Path) -> Path:
    """A copy of the package whose ledger has another fingerprint for one function that fp32-groups relies on."""
    for name in ("megacpp_stp", "recipes", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    entry = tmp_path / "patches" / "fp32-groups.yaml"
    (line,) = [line for line in entry.read_text().splitlines() if line.startswith(f"    {SETUP}: ")]
    entry.write_text(entry.read_text().replace(line, f"    {SETUP}: {'f' * 64}"))
    return tmp_path


def launch(root: Path, arguments: tuple[str, ...], *more: str) -> subprocess.CompletedProcess[str]:
    settings = [token for override in BF16 for token in ("--set", override)]
    command = [sys.executable, "-m", "megacpp_stp", *arguments, *settings, "--run-dir", str(root / "run"), *more]
    env = {**environment(), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, env=env)


def test_an_unreviewed_upstream_is_refused_before_the_run(unreviewed, short_run):
    done = launch(unreviewed, short_run)
    assert done.returncode == 2
    assert f"patch fp32-groups: refused: not as reviewed in 0.19.2: {SETUP}" in done.stderr
    assert "--allow-unreviewed fp32-groups" in done.stderr
    assert not (unreviewed / "run").exists()


def test_a_permission_that_nothing_needs_is_refused(unreviewed, short_run):
    done = launch(unreviewed, short_run, "--allow-unreviewed", "dataset-helpers")
    assert done.returncode == 2
    assert "--allow-unreviewed: has nothing unreviewed (got 'dataset-helpers')" in done.stderr


@pytest.mark.slow
def test_what_was_allowed_runs_loudly_and_is_in_the_receipt(unreviewed, short_run):
    """Two ranks in bf16: both surfaces are called through their real consumers, each where its entry says."""
    done = launch(unreviewed, short_run, "--allow-unreviewed", "fp32-groups")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    warning = f"WARNING: patch fp32-groups meets code that nobody reviewed (--allow-unreviewed): {SETUP}"
    assert done.stderr.count(warning) == 2  # the launcher's and rank 0's
    receipt = json.loads((unreviewed / "run" / "receipt.json").read_text())
    assert receipt["allowed_unreviewed"] == ["fp32-groups"]
    helpers, groups = receipt["patches"]
    assert (helpers["id"], helpers["state"], helpers["called_on_ranks"]) == (
        "dataset-helpers",
        "active",
        {COMPILE: [0]},
    )
    assert (groups["id"], groups["state"], groups["unreviewed"]) == ("fp32-groups", "active, unreviewed", [SETUP])
    assert groups["called_on_ranks"][SETUP] == [0, 1]
    ranks = json.loads((unreviewed / "run" / "patches.json").read_text())
    assert ranks.keys() == {"0", "1"}
    assert [state["calls"] for state in ranks["1"]][0] == {}
    assert all(state["state"] == "active" and state["probe"] for states in ranks.values() for state in states)
