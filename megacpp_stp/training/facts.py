"""What a rank knows of itself: substrate, data, environment, memory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import megacpp_stp
from megacpp_stp.data.manifest import data_facts, load_manifest
from megacpp_stp.plan.env_guard import recorded_environment
from megacpp_stp.plan.flops import total
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.stages import choose_stages
from megacpp_stp.preflight.machine import UNKNOWN, Probe, apex_kind
from megacpp_stp.preflight.nvidia import DRIVER_FILE, parse_driver
from megacpp_stp.recipe import restore_recipe
from megacpp_stp.runs.files import METRICS, RECEIPT, read_json
from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.runs.receipt import now
from megacpp_stp.runs.totals import Totals, Work, peak_flops

# By import rather than by name, what this package, Megatron on the paths that it takes, or Transformer Engine calls
# where it is installed: some of it they use without being asked.
_PACKAGES = (
    "megatron-core",
    "torch",
    "triton",
    "pytorch-triton",  # the same, in NVIDIA's containers
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "accelerated-model-architectures",  # XMA
    "cut-cross-entropy",
    "liger-kernel",
    "flash-attn",
    "flash-attn-3",
    "flashattn-hopper",  # version 3 as it was called first
    "flash-mla",
    "tilelang",
    "nvidia-cudnn-frontend",
    "fast-hadamard-transform",
    "nvidia-resiliency-ext",  # Megatron writes checkpoints through it
    "einops",
    "tokenizers",
    "transformers",
    "numpy",
)


def substrate(device: str) -> dict[str, Any]:
    """Hardware and software of this process. No host name, no path."""
    hardware: dict[str, Any] = {"device": device, "machine": platform.machine(), "cpu_count": os.cpu_count()}
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware |= {"cuda": torch.version.cuda, "nccl": nccl_version(), "driver": driver_version()}
    return {
        "hardware": hardware,
        "python": sys.version.split()[0],
        "megacpp_stp": megacpp_stp.__version__,
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Of the packages that change what a run computes, those that are installed."""
    found = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    if (kind := apex_kind()) is not None:
        found["apex"] = f"{_version('apex') or UNKNOWN} ({kind})"
    return found


def nccl_version() -> str:
    """Of the NCCL that torch calls."""
    return ".".join(map(str, torch.cuda.nccl.version()))


def driver_version() -> str | None:
    """Of the GPU's driver; None where the system does not say."""
    return parse_driver(Probe().text(DRIVER_FILE) or "")


def data_digest(path: Path) -> str:
    """sha256 over `data_facts` of a prepared dataset: equal for equal content.

    Raises:
        UserError: There is none.
    """
    text = json.dumps(data_facts(load_manifest(path, field="data.path")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def allowed_environment(plan: Mapping[str, Any]) -> dict[str, str]:
    """The variables of the allow-list that are set in this process."""
    return recorded_environment(plan, os.environ)


def peak_memory_bytes(device: str) -> int:
    """This process's peak memory: of the GPU's allocator on ``cuda``, resident size on ``cpu``."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def resident_memory_stats(device: object = None) -> dict[str, Any]:
    """Resident memory of this process, in the shape of the CUDA allocator's statistics."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    current = pages * os.sysconf("SC_PAGE_SIZE")
    # The kernel brings the peak up to date later than the current size.
    peak = max(current, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    resident = {"all": {"current": current, "peak": peak}}
    # Nobody counts the allocations of the C library.
    unknown = {"all": {"current": float("nan")}}
    return {"allocated_bytes": resident, "reserved_bytes": resident, "allocation": unknown}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def work_of(plan: Mapping[str, Any]) -> Work:
    """What each process of a plan does for a token."""
    recipe = restore_recipe(plan["recipe"])
    layout = lower(recipe, stages=choose_stages(recipe))
    return Work(
        flops_per_token=total(recipe, parts(recipe, layout)).training,
        processes=recipe.launch.nodes * recipe.launch.processes_per_node,
        peak_flops=peak_flops(torch.cuda.get_device_name() if plan["device"] == "cuda" else None),
    )


def totals_of(directory: Path) -> Totals:
    """The sums of a run up to where this attempt goes on; every rank keeps them."""
    receipt, path = directory / RECEIPT, directory / METRICS
    # Under plain torchrun, rank 0 writes the receipt about now.
    started = read_json(receipt)["started"] if receipt.exists() else now()
    return Totals(started=started, records=read_metrics(path) if path.exists() else ())
