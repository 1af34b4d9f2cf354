"""The reference mixer against the authors' own module, and the adapter to their op against our scan: Triton's
interpreter runs their forward kernel on a CPU.

Needs mamba-ssm without its CUDA extensions (MAMBA_SKIP_CUDA_BUILD=TRUE), einops and triton; skipped where one is not
installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

ABSENT = [name for name in ("mamba_ssm", "einops", "triton") if importlib.util.find_spec(name) is None]
# Length, groups, share of rotated channels; the authors' module has rotation always.
MODULES = [(37, 1, 0.5), (64, 2, 0.5), (50, 4, 1.0)]
CASES = [*MODULES, (22, 2, 0.0)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}"),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    # A process of its own: the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.unit._mamba3_upstream", json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(MODULES)))
def test_reference_mixer_equals_the_authors_module(errors, number):
    assert errors["module"][number] < 2e-5


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_adapter_to_the_authors_op_equals_our_scan(errors, number):
    assert errors["adapter"][number] < 2e-6
