"""Judging CUDA, GPUs and memory."""

from __future__ import annotations

from collections.abc import Iterator

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.memory import GIB, RankMemory, rank_memories
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.placement import INSIDE, place, straddling_fix, straddling_text
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, fine, refused, warning
from megacpp_stp.preflight.machine import SHARED_MEMORY, Machine
from megacpp_stp.preflight.nvidia import is_nvlink

_NO_GPU = "rules out --device cuda; --device cpu works"
_BF16_SINCE = (8, 0)  # CUDA C++ Programming Guide, "Compute Capabilities": bfloat16 from 8.0 on
_FP8_SINCE = (8, 9)  # Transformer Engine, pytorch/quantization.py
_BUSY = GIB
_SHARED_BY_NCCL = GIB  # NCCL User Guide, "Docker": --shm-size=1g
_TOKEN_BYTES = 8 + 8 + 8 + 4  # tokens, labels, position ids, loss mask, as Megatron's GPTDataset makes them
_PREFETCHED = 2  # torch's DataLoader, batches a worker


def check_cuda(case: Case) -> Iterator[Finding]:
    """What torch was built for, and whether the driver runs it."""
    machine = case.machine
    if case.plan is not None and not case.on_gpu:
        return
    judge = refused if case.on_gpu else warning
    if machine.torch_cuda is None:
        if "torch" in machine.packages:
            yield judge("CUDA", "torch is built without", why=_NO_GPU, fix="install a torch built for CUDA")
        return
    yield fine("CUDA", f"{machine.torch_cuda}, which torch is built for")
    if machine.driver_cuda is None and machine.driver is None and not machine.gpus and case.plan is None:
        yield fine("driver", "none", _NO_GPU)
        return
    if machine.driver_cuda is None:
        found = "none" if machine.driver is None else f"{machine.driver}, whose libcuda cannot be loaded"
        yield judge("driver", found, why=_NO_GPU, fix="use a machine with NVIDIA's driver; containers need --gpus all")
        return
    newest = ".".join(map(str, machine.driver_cuda))
    found = f"{machine.driver or 'of unknown version'}, for CUDA up to {newest}"
    if not runs_on(machine):
        why = f"torch's CUDA {machine.torch_cuda} does not run on it"
        yield judge("driver", found, why=why, fix="update the driver, or install a torch for its CUDA")
    elif machine.driver_cuda < _version(machine.torch_cuda):
        why = f"older than torch's CUDA {machine.torch_cuda}: kernels that are compiled on this machine may not load"
        yield warning("driver", found, why=why, fix="update the driver")
    else:
        yield fine("driver", found)


def runs_on(machine: Machine) -> bool:
    """Whether the driver runs the CUDA that torch is built for; a driver runs all of one major version."""
    if machine.driver_cuda is None:
        return False
    return machine.torch_cuda is None or machine.driver_cuda[0] >= _version(machine.torch_cuda)[0]


def check_gpus(case: Case) -> Iterator[Finding]:
    """How many there are, of which type, and whether somebody else is on them."""
    if case.plan is not None and not case.on_gpu:
        return
    machine = case.machine
    names = sorted({gpu.name for gpu in machine.gpus})
    count = len(machine.gpus) if machine.usable is None else machine.usable
    found = f"{count} x {' and '.join(names)}" if count and names else f"{count}" if count else "none"
    wanted = case.plan.recipe.launch.processes_per_node if case.plan is not None else 0
    if case.plan is not None and count < wanted:
        why = f"{wanted} processes on this machine need one each"
        fix = "use --device cpu, or a machine with more GPUs"
        yield refused("GPUs", found, why=why, fix=fix, field="--device")
    elif not count:
        yield fine("GPUs", found, _NO_GPU)
    elif len(names) > 1:
        yield warning("GPUs", found, why="the slowest sets the pace, the smallest the size", fix="use GPUs of one type")
    else:
        yield fine("GPUs", found)
    yield from _too_old(case)
    busy = [gpu for gpu in machine.gpus if gpu.used_bytes > _BUSY]
    if busy:
        taken = ", ".join(f"GPU {gpu.index}: {_gib(gpu.used_bytes)}" for gpu in busy)
        why = "somebody else computes there, or a process of an earlier run is left"
        yield warning("GPU memory in use", taken, why=why, fix="see nvidia-smi, and wait or end it")


def _too_old(case: Case) -> Iterator[Finding]:
    if case.plan is None:
        return
    training = case.plan.recipe.training
    since = _FP8_SINCE if training.fp8 is not None else _BF16_SINCE if training.precision == "bf16" else (0, 0)
    old = next((gpu for gpu in case.machine.gpus if gpu.capability is not None and gpu.capability < since), None)
    if old is not None:
        what = "fp8" if training.fp8 is not None else "bf16"
        why = f"{what} needs compute capability {_text(since)}"
        fix = "use other GPUs, or another training.precision"
        yield refused("GPU type", f"{old.name} has {_text(old.capability)}", why=why, fix=fix)


def check_links(case: Case) -> Iterator[Finding]:
    """Whether all GPUs of this machine reach each other by NVLink."""
    machine = case.machine
    if len(machine.gpus) < 2 or (case.plan is not None and not case.on_gpu):
        return
    kinds = sorted(set(machine.links.values()))
    if not kinds:
        yield fine("NVLink", "unknown: nvidia-smi topo -m shows no matrix")
    elif all(is_nvlink(kind) for kind in kinds):
        yield fine("NVLink", f"between all GPUs ({', '.join(kinds)})")
    else:
        slow = ", ".join(f"{a}-{b} {kind}" for (a, b), kind in sorted(machine.links.items()) if not is_nvlink(kind))
        found = f"not between {slow[:80]}{'...' if len(slow) > 80 else ''}"
        if case.plan is not None and _crosses_links(case.plan):
            why = "tensor and expert parallelism exchange activations in each layer: over PCIe they mostly wait"
            fix = "use a machine with NVLink, or parallel.tensor and parallel.expert 1"
            yield warning("NVLink", found, why=why, fix=fix)
        else:
            yield fine("NVLink", found, "slow for tensor and expert parallelism")


def check_groups(case: Case) -> Iterator[Finding]:
    """Whether what exchanges something in each layer stays inside a node."""
    if case.plan is None:
        return
    placement = place(case.plan.recipe)
    axes = list(placement.straddling())
    for axis in axes:
        why = "each layer would wait for the network"
        yield warning(f"placement ({axis})", straddling_text(placement, axis), why=why, fix=straddling_fix(axis))
    if placement.nodes > 1 and not axes:
        yield fine("placement", f"groups of {' and '.join(INSIDE)} parallelism stay inside a node")


def check_memory(case: Case) -> Iterator[Finding]:
    """Whether the plan's estimate fits: what is certain of it, and all of it."""
    if case.plan is None:
        return
    plan = case.plan
    ranks = rank_memories(plan.recipe, plan.layout, parts(plan.recipe, plan.layout))
    if plan.device == "cpu":
        yield from _cpu_memory(case, plan, ranks)
        return
    if not case.machine.gpus:
        yield fine("GPU memory", "unknown: nvidia-smi shows no GPU")
        return
    room = min(gpu.memory_bytes for gpu in case.machine.gpus)
    worst = max(ranks, key=lambda rank: rank.peak_bytes)
    lasting = max(sum(row.bytes for row in rank.rows if row.phase == "always") for rank in ranks)
    found = f"{_gib(room)}, estimated need {_gib(worst.peak_bytes)} (pipeline rank {worst.rank})"
    fix = f"`megacpp-stp memory {plan.recipe.name}` shows the rows; the largest is {worst.largest.name}"
    if lasting > room:
        why = f"weights, gradients and optimizer alone are {_gib(lasting)}"
        yield refused("GPU memory", found, why=why, fix=fix)
    elif worst.peak_bytes > room:
        why = "the first iteration is likely to run out of memory, though activations are an estimate"
        yield warning("GPU memory", found, why=why, fix=fix)
    else:
        yield fine("GPU memory", found, "besides: CUDA's context and NCCL's buffers")


def _cpu_memory(case: Case, plan: RunPlan, ranks: tuple[RankMemory, ...]) -> Iterator[Finding]:
    here = plan.recipe.launch.processes_per_node
    need = sum(rank.peak_bytes for rank in ranks) * here // len(ranks)
    room = case.machine.available_bytes
    if room is None:
        yield fine("memory", f"unknown, estimated need {_gib(need)}")
        return
    found = f"{_gib(room)} available, estimated need of {here} processes {_gib(need)}"
    if need > room:
        why = "the system would swap, or end a process"
        yield warning("memory", found, why=why, fix="shorten training.sequence_length, or use a larger machine")
    else:
        yield fine("memory", found, "besides: what each process imports")


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Room for what data workers and NCCL pass between processes."""
    room = case.machine.shared_bytes
    if room is None:
        return
    found = f"{_gib(room)} free in {SHARED_MEMORY}"
    fix = "containers: --shm-size=16g or --ipc=host"
    need = _batches(case.plan) if case.plan is not None else 0
    if need > room:
        why = f"batches of the data workers need {_gib(need)}: a worker would end with a bus error"
        yield refused("shared memory", found, why=why, fix=f"{fix}; or data.workers 0")
    elif len(case.machine.gpus) > 1 and room < _SHARED_BY_NCCL and (case.plan is None or case.on_gpu):
        yield warning("shared memory", found, why="NCCL's channels inside a machine lie there", fix=fix)
    else:
        yield fine("shared memory", found)


def _batches(plan: RunPlan) -> int:
    """Bytes that the data workers of this machine hold ahead, at most."""
    training = plan.recipe.training
    batch = training.micro_batch_size * training.sequence_length * _TOKEN_BYTES
    return batch * _PREFETCHED * plan.recipe.data.workers * plan.recipe.launch.processes_per_node


def _crosses_links(plan: RunPlan) -> bool:
    parallel = plan.recipe.parallel
    return parallel.tensor > 1 or parallel.expert > 1


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _text(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))
