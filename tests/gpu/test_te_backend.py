"""Transformer Engine's own modules in the NAM stack, against the torch backend on the same GPU.

What surrounds them is proven without a GPU (`tests/parity/test_te_backend.py`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import SHORT, VOCAB, cli, dataset  # noqa: F401 - fixtures
from tests.gpu._nccl import on_gpu
from tests.parity import nam
from tests.parity.te_layers import KINDS, B, Errors, H, S, build, compare
from tests.parity.test_te_fp8 import DELAYED, SIZES, TENSORWISE
from tests.te_double import PATH

TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not TE, reason="Transformer Engine is not installed"),
]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def accepted(module: ast.Module) -> dict[str, set[str]]:
    """Of each class of the double, the names that its constructor takes."""
    found = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    found[node.name] = {argument.arg for argument in item.args.args} - {"self"}
    return found


def test_the_double_takes_nothing_that_the_real_modules_refuse():
    """Needs Transformer Engine, and no GPU."""
    import transformer_engine.pytorch as te

    source = Path(PATH, "transformer_engine", "pytorch", "__init__.py").read_text()
    doubles = accepted(ast.parse(source))
    assert {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"} <= doubles.keys()
    for name, wanted in doubles.items():
        real = inspect.signature(getattr(te, name).__init__).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in real.values()):
            assert wanted <= real.keys(), (name, wanted - real.keys())


# --- layer by layer -----------------------------------------------------------------------------------


def errors_of(kind: str) -> dict[str, Errors]:
    return {str(dtype): compare(kind, dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16)}


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_equals_the_torch_backends(kind):
    """Output and all gradients.

    In fp32 Transformer Engine's products are of TF32 operands, 10 bits each.  In bf16 each backend is as far from the
    torch backend's fp32 as its roundings bring it.
    """
    found = on_gpu(errors_of, kind)
    for name, error in found["torch.float32"].te.items():
        assert error < 5e-3, (name, error)
    rounded = found["torch.bfloat16"]
    for name, error in rounded.te.items():
        assert error < 2 * rounded.torch[name] + 5e-3, (name, error, rounded.torch[name])


def mamba2() -> dict[str, float]:
    layer = build("mamba2", torch.bfloat16, backend="te", device="cuda")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(S, B, H, generator=generator).to(device="cuda", dtype=torch.bfloat16).requires_grad_()
    once, tripled = layer(x) - x, layer(3 * x) - 3 * x
    once.float().square().mean().backward()
    gradients = {name: float(p.grad.float().norm()) for name, p in layer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(layer.named_parameters()))
    return {"tripled": float((once - tripled).float().norm() / once.float().norm()), **gradients}


@on_a_gpu
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
def test_mamba2_is_megatrons_mixer_behind_one_norm():
    """Without a norm, three times the input would not give the same; without a gradient, a weight would not learn."""
    found = on_gpu(mamba2)
    assert found.pop("tripled") < 3e-2
    assert all(math.isfinite(norm) and norm > 0 for norm in found.values()), found


# --- training -----------------------------------------------------------------------------------------

ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")
EVERY = (*nam.ALL_LETTERS, *ONE, "model.families.A.sparse.topk=48")  # all keys: rounding picks no others
PLAIN = (*nam.NO_EXPERTS, *ONE)
RECOMPUTED = (
    "model.families.E.grouped_gemm=true",
    "training.recompute={granularity: selective, modules: [core_attn, mla_up_proj, moe_act, layernorm]}",
)


def losses(variants: list[tuple[str, ...]], steps: int) -> list[list[float]]:
    """Of a few steps from the same weights."""
    batches = nam.microbatches

    def on_device(count: int, *, seed: int) -> Any:
        return ({name: tensor.cuda() for name, tensor in batch.items()} for batch in batches(count, seed=seed))

    nam.microbatches = on_device
    found = []
    for overrides in variants:
        steps_of = nam.train((*overrides, "training.checkpoint=null"), steps).steps
        found.append([step.loss for step in steps_of if step.loss is not None])
    return found


@on_a_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize(("letters", "more"), [(EVERY, RECOMPUTED), (PLAIN, ())], ids=["NAM56R", "NAM52"])
def test_both_backends_train_the_same_model(letters, more, precision, tolerance):
    letters = (*letters, f"training.precision={precision}")
    te, plain = on_gpu(losses, [(*letters, "model.backend=te", *more), letters], 5, timeout=500)
    assert len(te) == 5
    for ours, theirs in zip(te, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


@on_a_gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no fp8")
@pytest.mark.parametrize("fp8", [TENSORWISE, DELAYED], ids=["tensorwise", "delayed"])
def test_fp8_trains_as_bf16_does(fp8):
    """Three bits of mantissa: a step's loss moves by a few percent at most, and is not bf16's own."""
    found, rounded = on_gpu(losses, [(*SIZES, fp8), SIZES], 5, timeout=500)
    assert all(math.isfinite(loss) for loss in found)
    assert found == pytest.approx(rounded, rel=3e-2)
    assert found != rounded


@on_a_gpu
@pytest.mark.parametrize("name", ["nam56r-tiny", "nam52-tiny"])
def test_a_short_run_of_a_te_recipe(cli, dataset, tmp_path, name):  # noqa: F811
    settings = [*SHORT, f"data.path={dataset}", "model.backend=te", "training.precision=bf16"]
    settings += ["parallel.pipeline=1", "parallel.stages=auto", "launch.processes_per_node=1"]
    settings += ["optimizer.distributed=true"]
    settings += ["model.families.E.grouped_gemm=true"] if name == "nam56r-tiny" else []
    overrides = [token for setting in settings for token in ("--set", setting)]
    run = tmp_path / "run"
    done = cli("launch", name, "--device", "cuda", *overrides, "--run-dir", str(run), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["status"] == "complete"
    assert receipt["stack"] == "megacpp_stp.model.te_modules.TeStack"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert found[0] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert found[-1] < found[0]
