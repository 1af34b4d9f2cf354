"""The built wheel, installed alone: it plans, and it has no torch to do it with."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_base_install_plans_without_torch(tmp_path):
    """Needs a package index for the base dependencies."""

    def call(*command, **options):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    call(sys.executable, "-m", "venv", "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    (wheel,) = tmp_path.glob("*.whl")
    call(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    installed = call(python, "-m", "pip", "list", "--format", "freeze")
    assert "torch==" not in installed
    assert "megatron-core==" not in installed
    script = str(tmp_path / "venv" / "bin" / "megacpp-stp")
    argv = call(script, "plan", "nam56r-tiny", "--format", "argv")
    assert argv == (ROOT / "tests" / "golden" / "nam56r-tiny.cuda.argv").read_text()
    assert "nam56r-tiny" in call(script, "list")
    refused = subprocess.run([script, "launch", "nam56r-tiny", "--device", "cpu"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'megacpp-stp[train]'" in refused.stderr
    assert "Traceback" not in refused.stderr
