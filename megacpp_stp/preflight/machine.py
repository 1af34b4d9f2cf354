"""The facts of this machine, as far as preflight judges them.

`look` gathers them through a `Probe`, which tests replace by texts.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from megacpp_stp.preflight.nvidia import (
    DRIVER_FILE,
    QUERY,
    TOPOLOGY,
    Gpu,
    Links,
    parse_driver,
    parse_gpus,
    parse_links,
    visible,
)

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "triton": "triton",
    "transformer-engine": "transformer_engine",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "accelerated-model-architectures": "xma",
    "cut-cross-entropy": "cut_cross_entropy",
    "tilelang": "tilelang",
    "nvidia-cudnn-frontend": "cudnn",
    "flash-mla": "flash_mla",
    "apex": "apex",
}
"""Distributions that are looked for, and the module of each."""
UNKNOWN = "of unknown version"
SHARED_MEMORY = "/dev/shm"
_OTHER_NAMES = {"triton": "pytorch-triton"}  # in NVIDIA's containers and with nightly builds of torch
_TIMEOUT_S = 30
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Probe:
    """How facts are got from this machine; each method gives None for what is not there, and none raises."""

    def run(self, command: Sequence[str]) -> str | None:
        """What a command prints; None when it is missing, fails or hangs."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, errors="replace")
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def text(self, path: str) -> str | None:
        """A file's text."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def version(self, package: str) -> str | None:
        """Version of an installed distribution."""
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def folder(self, module: str) -> Path | None:
        """Where a package is that Python would import; nothing is imported."""
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        return Path(places[0]) if places else None

    def environment(self, name: str) -> str | None:
        """A variable of the environment."""
        return os.environ.get(name)

    def driver_cuda(self) -> int | None:
        """The newest CUDA that the driver can run, as 13020 for 13.2 (cuDriverGetVersion; needs no GPU)."""
        try:
            found = ctypes.c_int()
            return found.value if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found)) == 0 else None
        except (OSError, AttributeError):
            return None

    def torch_gpus(self) -> int | str:
        """How many GPUs torch sees, or why it cannot be imported. Imports torch."""
        try:
            import torch

            return torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:  # a broken installation may raise anything
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def shared_memory(self) -> int | None:
        """Free bytes of the file system through which processes share tensors."""
        try:
            found = os.statvfs(SHARED_MEMORY)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has.

    Attributes:
        python: Version of this interpreter.
        system: As ``Linux x86_64``.
        packages: Versions of those of `PACKAGES` that Python would import.
        apex: Whose apex is installed; None for none.
        torch_cuda: The CUDA that torch was built for; None for a CPU build, or without torch.
        torch_error: Why torch cannot be imported; None where it can, or was not tried.
        gpus: Those that a process may use, as nvidia-smi shows them.
        usable: How many torch can use; None where it was not asked.
        driver: Version of the GPU's driver.
        driver_cuda: The newest CUDA that it runs, as (13, 2).
        links: How GPUs are connected; empty where unknown.
        available_bytes: Memory that processes can still get, without swapping; None where unknown.
        shared_bytes: Free shared memory; None where unknown.
    """

    python: str
    system: str
    packages: Mapping[str, str]
    apex: Literal["NVIDIA's", "another project's"] | None = None
    torch_cuda: str | None = None
    torch_error: str | None = None
    gpus: tuple[Gpu, ...] = ()
    usable: int | None = None
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    links: Links
    available_bytes: int | None = None
    shared_bytes: int | None = None


def look(probe: Probe | None = None, *, ask_torch: bool) -> Machine:
    """Gather the facts.

    Args:
        probe: How; None for this machine's own.
        ask_torch: Whether to import torch, which takes seconds, for what it can use. Where nvidia-smi shows a GPU it
            is imported in any case.
    """
    probe = probe or Probe()
    packages = {name: _version(probe, name) for name, module in PACKAGES.items() if probe.folder(module) is not None}
    gpus, driver = parse_gpus(probe.run(QUERY) or "")
    gpus = visible(gpus, probe.environment(_VISIBLE))
    answer = probe.torch_gpus() if "torch" in packages and (ask_torch or gpus) else None
    newest = probe.driver_cuda()
    return Machine(
        python=".".join(map(str, sys.version_info[:3])),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        apex=apex_kind(probe),
        torch_cuda=_torch_cuda(probe),
        torch_error=answer if isinstance(answer, str) else None,
        gpus=gpus,
        usable=answer if isinstance(answer, int) else None,
        driver=driver or parse_driver(probe.text(DRIVER_FILE) or ""),
        driver_cuda=None if newest is None else (newest // 1000, newest % 1000 // 10),
        links=parse_links(probe.run(TOPOLOGY) or "") if len(gpus) > 1 else {},
        available_bytes=_available(probe.text("/proc/meminfo") or ""),
        shared_bytes=probe.shared_memory(),
    )


def apex_kind(probe: Probe | None = None) -> Literal["NVIDIA's", "another project's"] | None:
    """Whose apex Python would import: PyPI's package of that name is a toolkit for a web framework."""
    folder = (probe or Probe()).folder("apex")
    if folder is None:
        return None
    return "NVIDIA's" if (folder / "multi_tensor_apply").is_dir() else "another project's"


def _version(probe: Probe, package: str) -> str:
    names = [package, *([_OTHER_NAMES[package]] if package in _OTHER_NAMES else [])]
    return next((found for name in names if (found := probe.version(name)) is not None), UNKNOWN)


def _torch_cuda(probe: Probe) -> str | None:
    """The CUDA in torch/version.py, without importing torch."""
    folder = probe.folder("torch")
    text = probe.text(str(folder / "version.py")) if folder is not None else None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text or "", re.MULTILINE)
    return match[1] if match else None


def _available(meminfo: str) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return 1024 * int(match[1]) if match else None
