"""Surface `dataset-helpers`: upstream's call ends the process without it, and succeeds with it."""

from __future__ import annotations

import subprocess
import sys

import megatron.core.datasets.helpers_cpp as helpers_cpp
import megatron.core.datasets.utils as datasets_utils
import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.registry import Activation, Registry
from tests.unit.patch_surfaces import CORE

CONSUMER = "megatron.training.initialize:_compile_dependencies"


def activate() -> Activation:
    return Registry.load().activate({"patches": ["dataset-helpers"]}, core=CORE)


def compile_as_upstream_does() -> None:
    """As `megatron.training.initialize._compile_dependencies` does: looked up at the call."""
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()


def test_upstreams_own_call_ends_the_process():
    with pytest.raises(SystemExit) as caught:
        compile_as_upstream_does()
    assert caught.value.code == 1


def test_the_real_consumer_succeeds_and_is_counted():
    script = f"""
import torch, types
from megatron.training import initialize
from megacpp_stp.patches.registry import Registry
initialize.get_args = lambda: types.SimpleNamespace()
torch.distributed.get_rank = lambda: 0
torch.distributed.barrier = lambda: None
with Registry.load().activate({{"patches": ["dataset-helpers"]}}) as active:
    initialize._compile_dependencies()
    assert active.calls() == {{"dataset-helpers": {{"{CONSUMER}": 1}}}}, active.calls()
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
    with activate() as active:
        assert datasets_utils.compile_helpers is not original
        assert [record.state for record in active.records] == [State.ACTIVE]
        compile_as_upstream_does()
    assert datasets_utils.compile_helpers is original


def test_an_extension_of_another_version_is_refused_before_the_run(monkeypatch):
    original = datasets_utils.compile_helpers
    monkeypatch.delattr(helpers_cpp, "build_sample_idx_int64")
    with pytest.raises(UserError, match="build_sample_idx_int64"):
        activate()
    assert datasets_utils.compile_helpers is original


def test_an_extension_that_does_not_load_is_refused_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(UserError, match="does not load"):
        activate()


def test_it_never_runs_make(monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ran.append(args))
    with activate():
        compile_as_upstream_does()
    assert ran == []
