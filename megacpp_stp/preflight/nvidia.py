"""What NVIDIA's tools print, as data.  Each parser takes text, and gives nothing for text that it does not know."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

MIB = 2**20
QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,memory.used,compute_cap,driver_version",
    "--format=csv,noheader,nounits",
)
TOPOLOGY = ("nvidia-smi", "topo", "-m")
DRIVER_FILE = "/proc/driver/nvidia/version"

_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # the header is underlined, in a pipe too
_COLUMNS = re.compile(r"\t+| {2,}")

Links = dict[tuple[int, int], str]
"""By pair of GPU indices, smaller first: ``NV18`` for 18 NVLinks, or the PCI path (``PIX``, ``NODE``, ``SYS``...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine.

    Attributes:
        index: As nvidia-smi counts.
        uuid: Its identity.
        name: Its product name.
        memory_bytes: All of its memory.
        used_bytes: What processes and driver hold of it now.
        capability: Compute capability, as (9, 0); None when the driver does not say.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    capability: tuple[int, int] | None


def parse_gpus(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and the version of the driver from what `QUERY` prints; a line that is not as expected is left out."""
    gpus, driver = [], None
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != 7 or not row[0].isdecimal() or not row[3].isdecimal():
            continue
        index, uuid, name, total, used, capability, driver = (cell.strip() for cell in row)
        gpus.append(
            Gpu(
                index=int(index),
                uuid=uuid,
                name=name,
                memory_bytes=int(total) * MIB,
                used_bytes=int(used) * MIB if used.isdecimal() else 0,
                capability=_version(capability),
            )
        )
    return tuple(gpus), driver


def visible(gpus: tuple[Gpu, ...], choice: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a process may use.

    Args:
        gpus: All of the machine.
        choice: CUDA_VISIBLE_DEVICES; None when it is not set.

    Returns:
        Those that it names by index or UUID, in its order; CUDA stops at the first that it does not know.
    """
    if choice is None:
        return gpus
    found: list[Gpu] = []
    for name in (part.strip() for part in choice.split(",")):
        gpu = next((one for one in gpus if name and (name == str(one.index) or one.uuid.startswith(name))), None)
        if gpu is None:
            break
        found.append(gpu)
    return tuple(found)


def parse_links(text: str) -> Links:
    """How GPUs are connected, from what `TOPOLOGY` prints; empty when it holds no matrix."""
    lines = [_STYLE.sub("", line) for line in text.splitlines()]
    columns: list[str] = []
    links: Links = {}
    for line in lines:
        cells = [cell.strip() for cell in _COLUMNS.split(line.strip())]
        if not columns:
            if cells[0] == "GPU0" and "X" not in cells:
                columns = [cell for cell in cells if re.fullmatch(r"GPU\d+", cell)]
            continue
        match = re.fullmatch(r"GPU(\d+)", cells[0])
        if match is None or len(cells) <= len(columns):
            continue
        row = int(match[1])
        for name, cell in zip(columns, cells[1:], strict=False):
            column = int(name.removeprefix("GPU"))
            if row < column:
                links[row, column] = cell
    return links


def is_nvlink(link: str) -> bool:
    """Whether a cell of the matrix names NVLinks."""
    return re.fullmatch(r"NV\d+", link) is not None


def parse_driver(text: str) -> str | None:
    """Version of the kernel's driver from `DRIVER_FILE`."""
    match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return match[1] if match else None


def _version(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None
