"""What a rank knows of itself: substrate, data, environment, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import megacpp_stp
from megacpp_stp.data.manifest import DatasetManifest

_PACKAGES = (
    "megatron-core",
    "torch",
    "triton",
    "transformer-engine",
    "mamba-ssm",
    "liger-kernel",
    "tokenizers",
    "transformers",
    "numpy",
)
# Variables that change what a run computes or how fast; nothing else of the environment leaves the machine.
_ENV_ALLOWED = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "NCCL_ALGO",
    "NCCL_DEBUG",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
    "WORLD_SIZE",
)


def substrate(device: str) -> dict[str, Any]:
    """Hardware and software of this process. No host name, no path."""
    hardware: dict[str, Any] = {"device": device, "machine": platform.machine(), "cpu_count": os.cpu_count()}
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["cuda"] = torch.version.cuda
    return {
        "hardware": hardware,
        "python": sys.version.split()[0],
        "megacpp_stp": megacpp_stp.__version__,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def data_facts(manifest: DatasetManifest) -> dict[str, Any]:
    """What the run reads, by content."""
    splits = {
        name: {"tokens": info.tokens, "documents": info.documents, "bin_sha256": info.bin_sha256}
        for name, info in (("train", manifest.split("train")), ("valid", manifest.split("valid")))
    }
    tokenizer = {"vocab_size": manifest.tokenizer.vocab_size, "sha256": manifest.tokenizer.sha256}
    return {"splits": splits, "tokenizer": tokenizer, "source_sha256": manifest.source.sha256}


def allowed_environment() -> dict[str, str]:
    """The variables of the allow-list that are set."""
    return {name: os.environ[name] for name in _ENV_ALLOWED if name in os.environ}


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
