"""``doctor`` on a machine that has a GPU: what NVIDIA's tools really print is understood."""

import json

import pytest
import torch

from tests.e2e.conftest import cli  # noqa: F401 - fixture

pytestmark = pytest.mark.gpu


def test_a_gpu_machine_is_described(cli):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    done = cli("doctor", "--format", "json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in content["findings"]}
    assert findings["GPUs"]["found"] == f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    assert findings["CUDA"]["found"].startswith(torch.version.cuda)
    assert findings["driver"]["verdict"] == "fine" and "unknown" not in findings["driver"]["found"]
    assert [one["possible"] for one in content["abilities"]][:3] == [True, True, True]
    if torch.cuda.device_count() > 1:
        assert "unknown" not in findings["NVLink"]["found"]
