"""The recurrent mixers' kernels: how the authors' ops are called, and what is refused before one is.

Legend: s sequence, b batch, H heads, P channels of a head, G groups, N state channels, S rotated pairs; for M2RNN K key
and V value channels of a head.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.model.m2rnn import kernels as m2rnn_kernels
from megacpp_stp.model.m2rnn.kernels import M2RNN_SCANS, xma_m2rnn_scan
from megacpp_stp.model.m2rnn.reference import reference_scan as m2rnn_reference
from megacpp_stp.model.mamba3 import kernels as mamba3_kernels
from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.kernels import MAMBA3_SCANS, mamba_ssm_scan
from megacpp_stp.model.mamba3.reference import reference_scan
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.diff import compare
from megacpp_stp.plan.facts import Side
from megacpp_stp.recipe import load_recipe
from megacpp_stp.recipe.blocks import M2rnn, Mamba3
from megacpp_stp.runs.receipt import plan_facts
from megacpp_stp.training import preflight
from tests.unit.test_m2rnn_scan import scan_inputs as m2rnn_inputs
from tests.unit.test_mamba3_scan import cast, relative_errors, scan_inputs, with_gradients

FP32 = dict.fromkeys(("dt", "log_decay", "trap", "B_bias", "C_bias", "D"), torch.float32)


def mamba3_inputs(s: int = 20, **sizes: int) -> ScanInputs:
    """As the mixer makes them in bf16, of sizes that the kernels take and that are not alike."""
    return cast(scan_inputs(s, **{"b": 3, "H": 4, "P": 16, "N": 32, **sizes}), torch.bfloat16, **FP32)


def documented_mamba3(*, chunk_size: int, **given: Tensor) -> Tensor:
    """The op by its docstring: batch first, decay and step [b, H, s], trapezoid before its sigmoid, rates a head."""
    assert chunk_size == 16
    b, s, H, P = given["V"].shape
    G, N, S = given["Q"].shape[2], given["Q"].shape[3], given["Angles"].shape[3]
    assert given["K"].shape == given["Q"].shape == (b, s, G, N)
    assert given["Angles"].shape == (b, s, H, S) and S % 2 == 0
    assert {given[name].dtype for name in ("ADT", "DT", "Q_bias", "K_bias", "D")} == {torch.float32}
    for name in ("Q", "K", "V", "Z"):  # loaded by descriptors of rows
        assert given[name].is_contiguous() and given[name].dtype == torch.bfloat16, name
    wide = {name: tensor.double() for name, tensor in given.items()}
    one_head = [
        reference_scan(
            ScanInputs(
                **{k: wide[n][:, :, [h]].transpose(0, 1) for k, n in (("x", "V"), ("z", "Z"))},
                **{k: wide[n][:, :, [h // (H // G)]].transpose(0, 1) for k, n in (("B", "K"), ("C", "Q"))},
                **{k: wide[n][:, [h]].permute(2, 0, 1) for k, n in (("dt", "DT"), ("log_decay", "ADT"))},
                trap=torch.sigmoid(wide["Trap"][:, [h]].permute(2, 0, 1)),
                **{k: wide[n][[h]] for k, n in (("B_bias", "K_bias"), ("C_bias", "Q_bias"), ("D", "D"))},
                angle=wide["Angles"][:, :, h].transpose(0, 1),
            )
        )
        for h in range(H)
    ]
    return torch.cat(one_head, dim=2).transpose(0, 1).to(given["V"].dtype)


@pytest.mark.parametrize(("G", "S"), [(1, 4), (2, 8), (4, 0)])
def test_the_authors_mamba3_op_gets_each_input_in_its_layout(monkeypatch, G, S):
    monkeypatch.setattr(mamba3_kernels, "_authors_op", lambda: documented_mamba3)
    inputs = mamba3_inputs(G=G, S=S)
    wanted = with_gradients(reference_scan, cast(inputs, torch.float64))
    found = with_gradients(mamba_ssm_scan, inputs, chunk_size=16)
    assert found["y"].dtype == torch.bfloat16
    assert {name: found[name].dtype for name in FP32} == FP32
    errors = relative_errors(found, wanted)
    assert max(error for name, error in errors.items() if name in FP32) < 1e-5, errors
    assert max(errors.values()) < 2**-8, errors


def test_a_trapezoid_at_its_ends_has_a_finite_gradient(monkeypatch):
    """A sigmoid of fp32 reaches 1 and 0."""
    monkeypatch.setattr(mamba3_kernels, "_authors_op", lambda: documented_mamba3)
    inputs = mamba3_inputs(4)
    logits = torch.tensor([-200.0, -50.0, 50.0, 200.0])[:, None, None].expand(inputs.trap.shape)
    logits = logits.clone().requires_grad_()
    y = mamba_ssm_scan(replace(inputs, trap=torch.sigmoid(logits)), chunk_size=16)
    wanted = reference_scan(cast(replace(inputs, trap=torch.sigmoid(logits)), torch.float64))
    assert float((y.double() - wanted).detach().norm() / wanted.detach().norm()) < 2**-8
    (gradient,) = torch.autograd.grad(y.float().sum(), logits)
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("inputs", "options", "field"),
    [
        (lambda: cast(mamba3_inputs(), torch.float32), {}, "x"),
        (lambda: cast(mamba3_inputs(), torch.float64), {}, "x"),
        (lambda: cast(mamba3_inputs(), torch.float16), {}, "x"),
        (lambda: mamba3_inputs(P=24), {}, "head_dim"),
        (lambda: mamba3_inputs(N=8), {}, "state_dim"),
        (mamba3_inputs, {"chunk_size": 48}, "chunk_size"),
        (lambda: mamba3_inputs(21, H=6), {}, "s"),
        (lambda: replace(mamba3_inputs(), mimo_x=torch.ones(4, 2, 16)), {}, "mimo_rank"),
    ],
)
def test_what_the_mamba3_kernels_cannot_take_is_refused(monkeypatch, inputs, options, field):
    monkeypatch.setattr(mamba3_kernels, "_authors_op", lambda: pytest.fail("called"))
    with pytest.raises(UserError) as caught:
        mamba_ssm_scan(inputs(), **options)
    assert (caught.value.field, caught.value.fix) == (field, "use kernel torch")


@pytest.mark.parametrize(("s", "H"), [(21, 4), (20, 6)])
def test_the_mamba3_kernels_take_a_length_or_a_number_of_heads_that_divides_by_four(monkeypatch, s, H):
    monkeypatch.setattr(mamba3_kernels, "_authors_op", lambda: lambda **given: given["V"])
    assert mamba_ssm_scan(mamba3_inputs(s, H=H), chunk_size=16).shape[0] == s


def test_missing_ops_are_named(monkeypatch):
    monkeypatch.setattr(mamba3_kernels, "_OP", ("mamba_ssm.no_such", "op"))
    with pytest.raises(UserError, match="cannot be imported") as caught:
        mamba_ssm_scan(mamba3_inputs())
    assert caught.value.field == "--nam-mamba3-kernel"
    monkeypatch.setattr(m2rnn_kernels, "_OP", ("xma.no_such", "op"))
    with pytest.raises(UserError, match="cannot be imported") as caught:
        xma_m2rnn_scan(*m2rnn_inputs(4, 2, 3, 4, 5))
    assert caught.value.field == "--nam-m2rnn-kernel"


# --- M2RNN ----------------------------------------------------------------------------------------


def documented_m2rnn(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, forget_input: Tensor, input_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op by its docstring: batch first, a head in query and key, the gate itself, all in one dtype."""
    b, s, H, _ = value.shape
    assert query.shape == key.shape == (b, s, 1, key.shape[-1]) and forget_input.shape == (b, s, H)
    assert len({t.dtype for t in (query, key, value, weight, forget_input)}) == 1
    state = value.new_zeros(b, H, key.shape[-1], value.shape[-1]) if input_state is None else input_state
    outputs = []
    for t in range(s):
        forget = forget_input[:, t, :, None, None]
        candidate = torch.tanh(state @ weight + key[:, t, :, :, None] * value[:, t, :, None, :])
        state = forget * state + (1 - forget) * candidate
        outputs.append((query[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def authors_m2rnn() -> Any:
    """The op's own backend of plain torch, which any device runs."""
    from xma import KernelBackend
    from xma.layers.m2rnn.op import m2rnn

    return partial(m2rnn, kernel_backend=KernelBackend.torch)


def has_xma() -> bool:
    found = importlib.util.find_spec("xma")
    return any(
        Path(place, "layers/m2rnn/op.py").is_file() for place in (found and found.submodule_search_locations) or ()
    )


OPS = [
    pytest.param(lambda: documented_m2rnn, id="documented"),
    pytest.param(authors_m2rnn, id="authors", marks=pytest.mark.skipif(not has_xma(), reason="XMA is not installed")),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("s", "every", "with_state"), [(13, 4, True), (8, 4, False), (5, 64, True), (3, 1, False)])
def test_the_authors_m2rnn_op_gets_each_input_in_its_layout(monkeypatch, op, s, every, with_state, dtype):
    """Output, last state and all gradients; the authors' tanh is fp32's, whatever the dtype."""
    monkeypatch.setattr(m2rnn_kernels, "_authors_op", op)
    narrow = m2rnn_inputs(s, 2, 3, 5, 4, dtype=dtype)[: None if with_state else -1]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found = []
    for scan, inputs, options in (
        (xma_m2rnn_scan, narrow, {"checkpoint_every": every}),
        (m2rnn_reference, wide, {}),
    ):
        outputs = scan(*inputs, **options)
        generator = torch.Generator().manual_seed(5)
        seeds = [torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype) for x in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, seeds)])
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        error = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        assert error < (2**-8 if one.dtype == torch.bfloat16 else 1e-6), number
    assert found[0][0].dtype == dtype
    assert found[0][1].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"log_forget": torch.zeros(4, 2, 3, dtype=torch.bfloat16)}, "log_forget"),
        ({"query": torch.zeros(4, 2, 9)}, "query"),
    ],
)
def test_the_authors_m2rnn_op_is_not_called_with_what_ours_refuses(monkeypatch, change, field):
    monkeypatch.setattr(m2rnn_kernels, "_authors_op", lambda: pytest.fail("called"))
    names = ("query", "key", "value", "log_forget", "weight", "initial_state")
    given = dict(zip(names, m2rnn_inputs(4, 2, 3, 4, 5), strict=True))
    with pytest.raises(UserError) as caught:
        M2RNN_SCANS["xma"](**{**given, **change})
    assert caught.value.field == field


def test_the_name_triton_is_our_kernel_with_all_that_it_is_given(monkeypatch):
    from megacpp_stp.model.m2rnn import triton_scan

    monkeypatch.setattr(triton_scan, "triton_m2rnn_scan", lambda *tensors, **options: (tensors, options))
    tensors = tuple(m2rnn_inputs(4, 2, 3, 4, 5))
    assert M2RNN_SCANS["triton"](*tensors, checkpoint_every=7) == (tensors, {"checkpoint_every": 7})


# --- recipes --------------------------------------------------------------------------------------


def plan(*overrides: str, name: str = "nam56r", device: Any = "cuda") -> Any:
    return build_plan(load_recipe(name, overrides), device=device)


def test_each_kernel_that_a_recipe_can_name_is_there():
    assert set(MAMBA3_SCANS) == set(get_args(Mamba3.model_fields["kernel"].annotation))
    assert set(M2RNN_SCANS) == set(get_args(M2rnn.model_fields["kernel"].annotation))


def test_the_arguments_say_the_kernels():
    argv = plan("model.families.R.kernel=xma").argv
    assert argv[argv.index("--nam-mamba3-kernel") + 1] == "mamba-ssm"
    assert argv[argv.index("--nam-m2rnn-kernel") + 1] == "xma"
    assert argv[argv.index("--nam-mamba3-mimo-rank") + 1] == "1"


def test_a_receipt_says_the_kernels_and_differs_where_they_do():
    one, other = (plan(f"model.families.R.kernel={kernel}").as_dict() for kernel in ("triton", "xma"))
    assert plan_facts(one)["spec"]["kernels"] == {"M": "mamba-ssm", "R": "triton"}
    assert plan_facts(plan(name="raw-pattern").as_dict())["spec"]["kernels"] == {}
    found = compare(*(Side(given="", kind="plan", digest=side["digest"], plan=side) for side in (one, other)))
    assert [item.path for item in found.differences] == ["model.families.R.kernel"]


@pytest.mark.parametrize(
    ("override", "field"),
    [("M.kernel=mamba-ssm", "M.kernel"), ("R.kernel=triton", "R.kernel"), ("R.kernel=xma", "R.kernel")],
)
def test_kernels_of_gpus_are_refused_on_a_cpu(override, field):
    with pytest.raises(UserError, match="run on GPUs only") as caught:
        plan(f"model.families.{override}", name="nam56r-tiny", device="cpu")
    assert caught.value.field == f"model.families.{field}"
    plan(f"model.families.{override}", "training.precision=bf16", "training.checkpoint=null", name="nam56r-tiny")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("training.precision=fp32",), "M.kernel"),
        (("model.families.M.head_dim=48",), "M.head_dim"),
        (("model.families.M.state_dim=96",), "M.state_dim"),
        (("model.families.M.chunk_size=8",), "M.chunk_size"),
        (("model.families.M.mimo_rank=4",), "M.mimo_rank"),
        (("model.families.M.heads=110", "model.families.M.groups=1", "training.sequence_length=4094"), ""),
    ],
)
def test_what_mamba_ssm_cannot_take_is_refused_in_the_plan(overrides, field):
    with pytest.raises(UserError) as caught:
        plan(*overrides)
    assert caught.value.field == (f"model.families.{field}" if field else "training.sequence_length")
    plan(*overrides, "model.families.M.kernel=torch")


def test_heads_are_counted_on_a_rank():
    """12 heads divide by 4; the 6 of each of two ranks do not."""
    sizes = ("model.families.M.heads=12", "model.families.M.groups=2", "training.sequence_length=4098")
    two = ("parallel.tensor=2", "parallel.expert=4", "parallel.sequence_parallel=true")
    plan(*sizes)
    with pytest.raises(UserError, match="6 heads a rank"):
        plan(*sizes, *two)


def package(folder: Any, name: str, module: str = "") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('a launch imports no package to look at it')")
    if module:
        (folder / name / module).parent.mkdir(parents=True)
        (folder / name / module).touch()


@pytest.mark.parametrize(
    ("override", "name", "module"),
    [
        ("model.families.M.kernel=mamba-ssm", "mamba_ssm", "ops/triton/mamba3/mamba3_siso_combined.py"),
        ("model.families.R.kernel=xma", "xma", "layers/m2rnn/op.py"),
    ],
)
def test_a_launch_looks_for_the_kernel_and_not_for_the_name_of_its_package(
    monkeypatch, tmp_path, override, name, module
):
    only = plan("model.families.M.kernel=torch", "model.families.R.kernel=torch", override)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(importlib.import_module("sys").modules, name, raising=False)
    with pytest.raises(UserError, match="which is not installed") as caught:
        preflight._check_kernels(only)
    assert caught.value.field == override.split("=")[0]
    package(tmp_path, name)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=f"is installed without {module}"):
        preflight._check_kernels(only)
    (tmp_path / name / "__init__.py").unlink()
    (tmp_path / name).rmdir()
    package(tmp_path, name, module)
    importlib.invalidate_caches()
    preflight._check_kernels(only)
    preflight._check_kernels(plan("model.families.M.kernel=torch", "model.families.R.kernel=torch"))
