"""Machines for tests: what their tools print, and what preflight knows of them."""

from dataclasses import replace
from pathlib import Path

from megacpp_stp.preflight.machine import Machine, Probe
from megacpp_stp.preflight.nvidia import DRIVER_FILE, QUERY, TOPOLOGY, Gpu, parse_links

GIB = 2**30

# As `nvidia-smi --query-gpu=...` prints them for two GPUs.
TWO_GPUS = """\
0, GPU-5a1f0c11-aaaa-0000-1111-222233334444, NVIDIA H200, 143771, 4, 9.0, 570.86.15
1, GPU-6b2f0c11-bbbb-0000-1111-222233334444, NVIDIA H200, 143771, 2049, 9.0, 570.86.15
"""
# As `nvidia-smi topo -m` prints it: an underlined header, tabs, NICs, affinities, a legend.
NVLINK_8 = (
    "\t\x1b[4m"
    + "\t".join([*(f"GPU{n}" for n in range(8)), "NIC0", "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    + "\x1b[0m\n"
    + "".join(
        f"GPU{row}\t"
        + "\t".join(" X " if row == column else "NV18" for column in range(8))
        + "\tPIX\t0-55,112-167\t0\t\tN/A\n"
        for row in range(8)
    )
    + "NIC0\t"
    + "\t".join(["PIX"] * 8)
    + "\t X \n"
    + "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
# Four GPUs in two pairs, as a table that was copied: spaces, no styles.
PAIRS_4 = """\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity
GPU0     X      NV4     SYS     SYS     0-23            0
GPU1    NV4      X      SYS     SYS     0-23            0
GPU2    SYS     SYS      X      NV4     24-47           1
GPU3    SYS     SYS     NV4      X      24-47           1
"""
ONE_GPU = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-15\t0\t\tN/A\n"
PROC_DRIVER = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)  Thu Jan  2 2025
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""


def gpu(index, **changes):
    first = Gpu(
        index=index,
        uuid=f"GPU-{index}",
        name="NVIDIA H200",
        memory_bytes=140 * GIB,
        used_bytes=0,
        capability=(9, 0),
    )
    return replace(first, **changes)


PACKAGES = {
    "torch": "2.15.0",
    "megatron-core": "0.19.2",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "triton": "3.9.0",
}
LAPTOP = Machine(python="3.12.4", system="Linux x86_64", packages={}, links={}, shared_bytes=GIB)
CPU_MACHINE = replace(LAPTOP, packages=PACKAGES, torch_cuda="13.2", usable=0, available_bytes=16 * GIB)
NODE = replace(
    CPU_MACHINE,
    packages=PACKAGES | {"transformer-engine": "2.20.2", "mamba-ssm": "2.3.2", "causal-conv1d": "1.5.3"},
    gpus=tuple(gpu(index) for index in range(8)),
    usable=8,
    driver="590.10",
    driver_cuda=(13, 2),
    links=parse_links(NVLINK_8),
)


class FakeProbe(Probe):
    """A machine as texts.

    Args:
        commands: What each prints; the others are missing.
        files: Texts by path.
        versions: Of distributions.
        folders: Of modules.
        driver: As cuDriverGetVersion gives it.
        gpus: What torch says when it is asked.
        variables: The environment.
    """

    def __init__(self, *, commands=None, files=None, versions=None, folders=None, driver=None, gpus=0, variables=None):
        self.commands, self.files = commands or {}, files or {}
        self.versions, self.folders = versions or {}, folders or {}
        self.driver, self.gpus, self.variables = driver, gpus, variables or {}
        self.asked_torch = False

    def run(self, command):
        return self.commands.get(tuple(command))

    def text(self, path):
        return self.files.get(path)

    def version(self, package):
        return self.versions.get(package)

    def folder(self, module):
        return self.folders.get(module)

    def environment(self, name):
        return self.variables.get(name)

    def driver_cuda(self):
        return self.driver

    def torch_gpus(self):
        self.asked_torch = True
        return self.gpus

    def shared_memory(self):
        return 64 * 2**20


def gpu_probe(**changes):
    """Two H200 and a torch for CUDA 13.2."""
    texts = {
        "commands": {QUERY: TWO_GPUS, TOPOLOGY: "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X \n"},
        "files": {
            "/env/torch/version.py": "from typing import Optional\ncuda: Optional[str] = '13.2'\nhip = None\n",
            "/proc/meminfo": "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n",
            DRIVER_FILE: PROC_DRIVER,
        },
        "versions": {"torch": "2.15.0+cu132", "pytorch-triton": "3.9.0"},
        "folders": {"torch": Path("/env/torch"), "triton": Path("/env/triton"), "mamba_ssm": Path("/env/mamba_ssm")},
        "driver": 13020,
        "gpus": 2,
    }
    return FakeProbe(**(texts | changes))
