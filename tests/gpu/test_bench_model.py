"""``bench model`` on a GPU: a layer of NAM56R of each kind at its own sequence length."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

PEAK_TFLOPS = 1000
"""More than an H200 reaches in bf16 (989, of its data sheet)."""


def test_every_kind_of_layer_of_nam56r_at_4096():
    from megacpp_stp.cli.bench import app

    arguments = ["nam56r", "--device", "cuda", "--sequence", "4096", "--micro-batch", "1", "--repeats", "5"]
    if importlib.util.find_spec("transformer_engine") is None:
        arguments += ["--backend", "torch"]
    if importlib.util.find_spec("mamba_ssm") is None:
        arguments += ["--set", "model.families.M.kernel=torch"]
    done = CliRunner().invoke(app, ["model", *arguments, "--format", "json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    print(json.dumps(answer, indent=2))
    pieces = {piece["share"]["piece"]: piece for piece in answer["pieces"]}
    assert pieces.keys() == {"mla", "dsa", "moe", "mamba3", "m2rnn", "head"}
    for name, piece in pieces.items():
        assert piece["parameters"] == piece["share"]["parameters"], name
        assert 0 < piece["tflops"] < PEAK_TFLOPS, name
        assert piece["peak_bytes"] > 4096 * 3584 * 2, name  # at least the output
    assert answer["model"]["flops_timed"] == pytest.approx(1)
