"""Run the authors' Mamba-3 under Triton's interpreter, and print how far from it is what here does the same.

    TRITON_INTERPRET=1 python -m tests.unit._mamba3_upstream '[[37, 1, 0.5]]'        # length, groups, rotated share

Two errors for each case: the reference mixer's to their module; and, on inputs of its own, the adapter to their op's
(`megacpp_stp.model.mamba3.kernels`) to `chunked_scan`.

What is replaced in the authors' package, none of it the formula: the CUDA extension of another model, an autotuner that
needs a driver, four elementary functions written in GPU assembly, the norm's kernel by its plain form from the same
file, and the cast of the kernel's inputs to bf16, which the interpreter gets wrong.  The backward kernel does not run
in the interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner

from megacpp_stp.model.mamba3 import kernels
from megacpp_stp.model.mamba3.chunked import chunked_scan
from megacpp_stp.model.mamba3.reference import reference_mixer
from tests.unit.test_mamba3_scan import cast, scan_inputs

HIDDEN, HEADS, HEAD_DIM, STATE, CHUNK = 24, 4, 16, 16, 16


@triton.jit
def cos_approx(x):
    return tl.cos(x)


@triton.jit
def sin_approx(x):
    return tl.sin(x)


@triton.jit
def tanh_approx(x):
    return 2 * tl.sigmoid(2 * x) - 1


def authors_module() -> Any:
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    tune = Autotuner.run

    def run_the_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.configs = self.configs[:1]
        return tune(self, *args, **kwargs)

    Autotuner.run = run_the_first
    for name in ("utils", "angle_dt", "mamba3_siso_fwd"):
        module = importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{name}")
        for function in (cos_approx, sin_approx, tanh_approx):
            if hasattr(module, function.fn.__name__):
                setattr(module, function.fn.__name__, function)
    authors = importlib.import_module("mamba_ssm.modules.mamba3")
    kernel = importlib.import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")._Mamba3Function
    norm = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")

    def without_the_cast(Q: Any, K: Any, V: Any, **other: Any) -> Any:
        names = ("ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z")
        tensors = (Q, K, V, *(other[name] for name in names))
        return kernel.apply(*(tensor.float() for tensor in tensors), *[None] * 5, other["chunk_size"], False)

    authors.mamba3_siso_combined = without_the_cast
    kernels._authors_op = lambda: without_the_cast
    authors.RMSNormGated.forward = lambda self, x: norm.rms_norm_ref(x, self.weight, self.bias, eps=self.eps)
    return authors


@torch.no_grad()
def relative_error(authors: Any, s: int, groups: int, rotation: float) -> float:
    torch.manual_seed(s)
    module = authors.Mamba3(
        HIDDEN,
        d_state=STATE,
        expand=HEADS * HEAD_DIM / HIDDEN,
        headdim=HEAD_DIM,
        ngroups=groups,
        rope_fraction=rotation,
        chunk_size=CHUNK,
    )
    for name, parameter in module.named_parameters():
        # Larger than at the start of training, so that every part of the formula weighs in.
        parameter.copy_(torch.randn_like(parameter) * (0.5 if "proj" in name else 1.0))
    # The first head's decay swings far enough to reach its floor.
    module.in_proj.weight[-2 * HEADS - module.num_rope_angles] *= 20
    hidden = torch.randn(2, s, HIDDEN)
    found = module(hidden).double()

    parameters = {name: p.double() for name, p in module.named_parameters()}
    for name in ("B_bias", "C_bias"):
        parameters[name] = parameters[name].squeeze(1)
    in_proj = parameters["in_proj.weight"]
    rows = in_proj.shape[0] - module.num_rope_angles
    parameters["in_proj.weight"], parameters["angle_proj.weight"] = in_proj[:rows], in_proj[rows:]
    wanted = reference_mixer(hidden.double().transpose(0, 1), parameters, heads=HEADS, groups=groups).transpose(0, 1)
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def error_of_the_adapter(s: int, groups: int, rotation: float) -> float:
    """On inputs that are bf16's, as it asks for; what the authors' op makes of them is fp32 here."""
    sizes = {"b": 2, "H": HEADS, "P": HEAD_DIM, "G": groups, "N": STATE, "S": int(STATE * rotation) // 2}
    inputs = cast(scan_inputs(s, **sizes), torch.float32)
    rounded = {
        name: getattr(inputs, name).bfloat16() for name in ("x", "z", "B", "C", "angle") if name in inputs.tensors()
    }
    found = kernels.mamba_ssm_scan(dataclasses.replace(inputs, **rounded), chunk_size=CHUNK)
    assert found.dtype == torch.float32
    wide = {name: tensor.double() for name, tensor in {**inputs.tensors(), **rounded}.items()}
    wanted = chunked_scan(dataclasses.replace(inputs, **wide), chunk_size=CHUNK + 3)
    return float((found.double() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    authors = authors_module()
    cases = json.loads(sys.argv[1])
    modules = [relative_error(authors, *case) for case in cases if case[-1]]
    print(json.dumps({"module": modules, "adapter": [error_of_the_adapter(*case) for case in cases]}))
