"""The same recipe path on CUDA with NCCL. Needs a GPU, and two for the pipeline."""

import json

import pytest
import torch

from tests.e2e.conftest import SHORT, cli, dataset  # noqa: F401 - fixtures

pytestmark = pytest.mark.gpu


def launch(cli, dataset, directory, *more):  # noqa: F811
    settings = (*SHORT, f"data.path={dataset}", *more)
    overrides = [token for setting in settings for token in ("--set", setting)]
    return cli("launch", "nam56r-tiny", "--device", "cuda", *overrides, "--run-dir", str(directory), timeout=500)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_on_gpus_completes(cli, dataset, tmp_path, stages, precision):  # noqa: F811
    if torch.cuda.device_count() < stages:
        pytest.skip(f"needs {stages} GPUs")
    layout = [f"parallel.pipeline={stages}", f"launch.processes_per_node={stages}"]
    cut = "parallel.stages=[12]" if stages == 1 else "parallel.stages=[6,6]"
    done = launch(cli, dataset, tmp_path / "run", *layout, cut, f"training.precision={precision}")
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["status"] == "complete"
    assert receipt["substrate"]["hardware"]["device"] == "cuda"
    assert receipt["collected"]["taps"] == [6, 12]
