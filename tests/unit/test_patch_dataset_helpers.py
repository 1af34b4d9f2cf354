"""Patch `dataset-helpers`: upstream's call ends the process before it, and succeeds after it."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import megatron.core.datasets.helpers_cpp as helpers_cpp
import megatron.core.datasets.utils as datasets_utils
import pytest
import yaml

from megacpp_stp.errors import UserError
from megacpp_stp.patches import dataset_helpers, surface
from megacpp_stp.patches.dataset_helpers import SURFACE, apply


def compile_as_upstream_does() -> None:
    """As `megatron.training.initialize._compile_dependencies` does: looked up at the call."""
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()


def test_upstreams_own_call_ends_the_process():
    with pytest.raises(SystemExit) as caught:
        compile_as_upstream_does()
    assert caught.value.code == 1


def test_the_real_consumer_succeeds_after_apply():
    script = """
import torch, types
from megatron.training import initialize
from megacpp_stp.patches.dataset_helpers import apply
initialize.get_args = lambda: types.SimpleNamespace()
torch.distributed.get_rank = lambda: 0
torch.distributed.barrier = lambda: None
with apply():
    initialize._compile_dependencies()
print("came back")
try:
    initialize._compile_dependencies()
except SystemExit as error:
    print("exit", error.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "came back" in done.stdout, done.stderr
    assert done.stdout.endswith("exit 1\n")


def test_undo_restores_the_original_by_identity():
    original = datasets_utils.compile_helpers
    patch = apply()
    assert datasets_utils.compile_helpers is not original
    compile_as_upstream_does()
    patch.undo()
    assert datasets_utils.compile_helpers is original
    patch.undo()


def test_undo_refuses_to_drop_somebody_elses_replacement(monkeypatch):
    original = datasets_utils.compile_helpers
    patch = apply()
    datasets_utils.compile_helpers = theirs = lambda: None
    with pytest.raises(RuntimeError, match="no longer the replacement"):
        patch.undo()
    assert datasets_utils.compile_helpers is theirs
    datasets_utils.compile_helpers = original


@pytest.mark.parametrize("found", ["0.18.0", "0.19.1", "0.20.0"])
def test_a_version_out_of_range_is_refused(monkeypatch, found):
    monkeypatch.setattr(surface, "version", lambda package: found)
    original = datasets_utils.compile_helpers
    with pytest.raises(UserError, match="megatron-core >=0.19.2,<0.20"):
        apply()
    assert datasets_utils.compile_helpers is original


def test_an_extension_of_another_version_is_refused(monkeypatch):
    monkeypatch.delattr(helpers_cpp, "build_sample_idx_int64")
    with apply(), pytest.raises(UserError, match="build_sample_idx_int64"):
        compile_as_upstream_does()


def test_an_extension_that_does_not_load_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with apply(), pytest.raises(UserError, match="does not load"):
        compile_as_upstream_does()


def test_with_a_makefile_upstream_builds_as_before(monkeypatch, tmp_path):
    (tmp_path / "Makefile").write_text("all:\n")
    monkeypatch.setattr(dataset_helpers, "_folder", lambda: tmp_path)
    calls = []
    monkeypatch.setattr(datasets_utils, "compile_helpers", lambda: calls.append("upstream"))
    assert not dataset_helpers.eligible()
    with apply():
        compile_as_upstream_does()
    assert calls == ["upstream"]


def test_the_ledger_entry_says_what_the_surface_says():
    path = Path(__file__).parents[2] / "patches" / f"{SURFACE.id}.yaml"
    entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: entry[name] for name in ("id", "target", "upstream")} == {
        "id": SURFACE.id,
        "target": SURFACE.target,
        "upstream": SURFACE.upstream,
    }
    assert tuple(entry["consumers"]) == SURFACE.consumers
    for name in ("what", "why_not_by_argument_or_spec", "upstream_reference", "delete_when"):
        assert entry[name].strip()


def test_a_surface_resolves_into_a_class():
    owner, name = surface.Surface(
        id="x", title="", why="", target="pathlib:Path.home", consumers=(), upstream=">=0"
    ).resolve()
    assert (owner, name) == (Path, "home")
    assert isinstance(owner, type) and not isinstance(owner, types.ModuleType)
